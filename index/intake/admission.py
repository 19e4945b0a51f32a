"""Accept a file from an upload or `index import`: all checks, then one transaction. A confirmed file is never lost."""

from __future__ import annotations

import hashlib
import sqlite3
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from packaging.utils import canonicalize_version

from gracefarm import variants
from index.errors import ForbiddenError, RefusedError
from index.intake import sdist, wheel
from index.intake.defects import Defects
from index.intake.metadata import Metadata
from index.names import Distribution, parse_filename
from index.store import facts, provenance, records
from index.store.auth import NIGHTLY
from index.store.catalogue import Catalogue, Transaction, timestamp
from index.store.facts import CudaFacts
from index.store.files import Store
from index.store.variants import variant_of

Admission = Literal["created", "same"]


@dataclass(frozen=True, kw_only=True)
class Destination:
    """The destination of a file."""

    set_name: str | None = None
    "A staged set. Its files are hidden until it is published."
    channel: Literal["release", "nightly"] = "release"
    allow_new: bool = False
    "Host the project even if `index host` did not name it."
    variants: bool = False
    "Accept variant wheels (PEP 825, a draft) too."

    @property
    def scope(self) -> str | None:
        """The scope that a token needs if it is limited to one view."""
        return NIGHTLY if self.set_name is None and self.channel == "nightly" else self.set_name


@dataclass(frozen=True, kw_only=True)
class InspectedFile:
    """A file in staging whose content has passed all checks."""

    distribution: Distribution
    path: Path
    sha256: str
    size: int
    metadata: Metadata
    record: bytes | None
    variant: str | None
    "Content of variant.json, for a variant wheel."
    facts: CudaFacts
    build: str | None
    defects: str = ""
    "Defects of a file that was published elsewhere, one line each."
    uploaded: str | None = None
    "Upload time of the original; set by imports."


def inspect(path: Path, distribution: Distribution, sha256: str, uploaded: float | None = None) -> InspectedFile:
    """Read every byte of a staged file; return the facts for the catalogue.

    Raises:
        RefusedError: the file is invalid.
    """
    read = wheel.inspect if distribution.kind == "bdist_wheel" else sdist.inspect
    defects = Defects(distribution=distribution)
    metadata, record, variant = read(path, defects)
    document = records.parse(record) if record is not None else {}
    described = CudaFacts()
    if variant is not None:
        described = facts.from_variant(variants.parse(variant, distribution.variant).properties)
    return InspectedFile(
        distribution=distribution,
        path=path,
        sha256=sha256,
        size=path.stat().st_size,
        metadata=metadata,
        record=record,
        variant=variant,
        facts=facts.from_record(document).over(facts.from_name(distribution, metadata.requires)).over(described),
        build=records.identity(document),
        defects="\n".join(defects.sentences),
        uploaded=timestamp(datetime.fromtimestamp(uploaded, UTC)) if uploaded else None,
    )


def check_wanted(
    catalogue: Catalogue, distribution: Distribution, sha256: str, destination: Destination
) -> sqlite3.Row | None:
    """Make the checks that need no content; return the row of the file if the index has it already.

    `admit` repeats these checks inside its transaction.

    Raises:
        ForbiddenError, RefusedError: see there.
    """
    if distribution.variant and not destination.variants:
        raise ForbiddenError(
            f"{distribution.filename} is a variant wheel, but this index accepts only plain wheels",
            remedy="on the machine of the index, add --variants to `index serve` (for uploads) or to `index import`",
        )
    _check_hosted(catalogue, distribution, destination)
    _check_release(catalogue, distribution)
    _check_spelling(catalogue, distribution)
    row = catalogue.row("SELECT * FROM file WHERE filename = ?", (distribution.filename,))
    if row is not None:
        _check_same(distribution.filename, row["sha256"], row["deleted"], sha256)
    return row


def admit(
    store: Store,
    catalogue: Catalogue,
    actor: str,
    candidate: InspectedFile,
    destination: Destination,
    attested: bytes | None = None,
) -> Admission:
    """Add the file to the store and the catalogue. When this returns, the file is durable.

    `attested` is the provenance from its verified attestations (PEP 740).

    Raises:
        ForbiddenError: the index does not host the project, or the project is archived or quarantined.
        RefusedError: the name belongs or belonged to other bytes, or the release exists in another spelling.
        StoreFullError: the disk is full; nothing was changed.
    """
    distribution = candidate.distribution
    with catalogue.change(actor) as change:
        row = check_wanted(catalogue, distribution, candidate.sha256, destination)
        if row is not None:
            if row["lost"]:
                _restore(store, change, row["id"], candidate)
            _join(change, row["id"], distribution, destination)
            if attested is not None:
                provenance.keep(store, change, distribution.filename, attested)
            return "same"
        _check_variant(change, candidate)
        # Inside the transaction: `gc` holds the same lock, so it never sees a stored file whose row is still missing.
        store.adopt(candidate.path, candidate.sha256)
        metadata_sha256 = _keep_metadata(store, candidate)
        change.execute("INSERT OR IGNORE INTO project (name) VALUES (?)", (distribution.project,))
        build = candidate.build
        if candidate.record is not None and build is not None:
            own = records.keep_inside(store, change, build, candidate.record, distribution.project, candidate.sha256)
            build = build if own else None
        _insert(change, candidate, destination, metadata_sha256, build)
        if attested is not None:
            provenance.keep(store, change, distribution.filename, attested)
    return "created"


def _keep_metadata(store: Store, candidate: InspectedFile) -> str | None:
    """PEP 658, only for wheels: the build of an sdist may produce other metadata than its PKG-INFO."""
    if candidate.distribution.kind != "bdist_wheel":
        return None
    digest = hashlib.sha256(candidate.metadata.raw).hexdigest()
    store.add_bytes(candidate.metadata.raw, digest)
    return digest


def _restore(store: Store, change: Transaction, file_id: int, candidate: InspectedFile) -> None:
    """List a file again whose lost bytes were uploaded again."""
    store.adopt(candidate.path, candidate.sha256)
    _keep_metadata(store, candidate)
    change.execute("UPDATE file SET lost = 0 WHERE id = ?", (file_id,))
    change.note("file.found", candidate.distribution.filename, candidate.distribution.project)


def _insert(
    change: Transaction, candidate: InspectedFile, destination: Destination, metadata_sha256: str | None, build: str | None
) -> None:
    distribution = candidate.distribution
    known, channel = candidate.facts, destination.channel
    if destination.set_name is not None:
        row = change.execute("SELECT channel FROM release_set WHERE name = ?", (destination.set_name,)).fetchone()
        channel = row["channel"] if row is not None else channel
    if build is not None:
        known = records.facts_of(change, build).over(known)
    inserted = change.execute(
        "INSERT INTO file (filename, project, version, release, kind, sha256, size, metadata_sha256, requires_python, summary,"
        " uploaded, actor, channel, hidden, cuda, facts, build, variant, defects)"
        " VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?) RETURNING id",
        (
            *(distribution.filename, distribution.project, distribution.version),
            *(canonicalize_version(distribution.version), distribution.kind, candidate.sha256, candidate.size),
            *(metadata_sha256, candidate.metadata.requires_python, candidate.metadata.summary),
            *(candidate.uploaded or change.time, change.actor, channel, destination.set_name is not None),
            *(known.cuda, known.as_json(), build, candidate.variant, candidate.defects),
        ),
    ).fetchone()
    if destination.set_name is not None:
        _add_member(change, destination.set_name, inserted["id"])
    change.note(
        "file.upload",
        distribution.filename,
        distribution.project,
        sha256=candidate.sha256,
        size=candidate.size,
        set=destination.set_name,
        channel=channel,
    )


def _join(change: Transaction, file_id: int, distribution: Distribution, destination: Destination) -> None:
    """Repeated upload of the same bytes: add the file to the set, or show it in the channel of this upload."""
    if destination.set_name is not None:
        if _add_member(change, destination.set_name, file_id):
            change.note("file.join", distribution.filename, distribution.project, set=destination.set_name)
        return
    if destination.channel == "release":  # a nightly file, or one hidden in a set, becomes public
        shown = change.execute(
            "UPDATE file SET hidden = 0, channel = 'release' WHERE id = ? AND (hidden = 1 OR channel <> 'release')", (file_id,)
        )
    else:
        shown = change.execute("UPDATE file SET hidden = 0 WHERE id = ? AND hidden = 1", (file_id,))
    if shown.rowcount:
        change.note("file.upload", distribution.filename, distribution.project, shown=True, channel=destination.channel)


def _add_member(change: Transaction, set_name: str, file_id: int) -> bool:
    state = change.execute("SELECT state FROM release_set WHERE name = ?", (set_name,)).fetchone()
    if state is None or state["state"] != "staged":
        raise RefusedError(
            f"no set {set_name!r} is staged: it does not exist, or it is published or dropped",
            remedy="on the machine of the index, create a set with `index stage create NAME`; then upload to "
            "/stage/NAME/legacy/",
        )
    added = change.execute("INSERT OR IGNORE INTO member (set_name, file_id) VALUES (?, ?)", (set_name, file_id))
    return added.rowcount > 0


def _check_hosted(catalogue: Catalogue, distribution: Distribution, destination: Destination) -> None:
    project = catalogue.row("SELECT status, hosted FROM project WHERE name = ?", (distribution.project,))
    if (project is None or not project["hosted"]) and not destination.allow_new:
        raise ForbiddenError(
            f"this index does not host {distribution.project}",
            remedy=f"on the machine of the index, run `index host {distribution.project}`,"
            " or start `index serve` with --allow-new",
        )
    if project is not None and project["status"] in ("archived", "quarantined"):
        raise ForbiddenError(
            f"the project {distribution.project} is {project['status']}, so it accepts no files",
            remedy=f"run `index status {distribution.project} active` on the machine of the index, then upload again",
        )


def _check_variant(change: Transaction, candidate: InspectedFile) -> None:
    """All wheels of a release share one JSON (PEP 825), so a label has one meaning and all wheels have the same priorities."""
    if candidate.variant is None:
        return
    own = candidate.distribution
    rows = change.execute(
        "SELECT filename, variant FROM live_file WHERE project = ? AND version = ? AND variant IS NOT NULL",
        (own.project, own.version),
    )
    known = [variant for row in rows if (variant := variant_of(row)) is not None]
    try:
        variants.check_together([*known, variants.parse(candidate.variant, own.variant)])
    except ValueError as error:
        raise RefusedError(
            f"{own.filename} contradicts the existing variant wheels of {own.version}: {error}",
            remedy=f"build the wheel again: all variants of a release must have the same priorities and providers in "
            f"{variants.MEMBER}, and wheels with the same label must also have the same properties",
        ) from None


def _check_same(filename: str, known: str, deleted: str | None, sha256: str) -> None:
    # twine and uv search for the words "File already exists".
    if deleted is not None:
        raise RefusedError(
            f"File already exists: {filename} was deleted, and its name cannot be reused", remedy="build a new version"
        )
    if known != sha256:
        raise RefusedError(
            f"File already exists: {filename} has different content on this index (sha256 {known})",
            remedy="build a new version, since a published file never changes",
        )


def _check_release(catalogue: Catalogue, distribution: Distribution) -> None:
    """1.0 and 1.0.0 are the same release (PEP 440). A release keeps its first spelling."""
    if distribution.published:
        return
    releases = catalogue.rows(
        "SELECT DISTINCT version FROM live_file WHERE project = ? AND release = ?",
        (distribution.project, canonicalize_version(distribution.version)),
    )
    spellings = {str(row["version"]) for row in releases}
    if spellings and distribution.version not in spellings:
        raise RefusedError(
            f"{distribution.filename}: the files of this release on this index have the version {min(spellings)}",
            remedy=f"build the file with the version {min(spellings)}, since a release has one spelling of its version",
        )


def _check_spelling(catalogue: Catalogue, distribution: Distribution) -> None:
    """Installers treat Evil.Pkg-1.0 and evil_pkg-1.0 as the same file, so the index accepts only one of them."""
    rows = catalogue.rows(
        "SELECT filename FROM file WHERE project = ? AND release = ? AND filename <> ?",
        (distribution.project, canonicalize_version(distribution.version), distribution.filename),
    )
    for row in rows:
        if parse_filename(row["filename"], published=True).canonical == distribution.canonical:
            raise RefusedError(
                f"File already exists: {distribution.filename} is stored as {row['filename']}",
                remedy="use the stored file, or build a new version; a published file keeps its name",
            )
