"""Third-party wheels of a set's lock: copied or linked by their sha256, visible only in that set's view."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx
from packaging.utils import InvalidSdistFilename, InvalidWheelFilename, parse_sdist_filename, parse_wheel_filename
from packaging.version import InvalidVersion, Version
from pypi_simple import (
    PYPI_SIMPLE_ENDPOINT,
    DistributionPackage,
    NoSuchProjectError,
    PyPISimple,
    UnsupportedContentTypeError,
    UnsupportedRepoVersionError,
)
from requests import RequestException

from gracefarm.console import Tick, no_tick
from gracefarm.errors import DigestError, FetchError, UsageError
from gracefarm.pins import Pin
from gracefarm.variants import split_label
from index.errors import RefusedError
from index.intake import sdist, wheel
from index.intake.defects import Defects
from index.limits import Limits
from index.names import check_plain, parse_mirrored
from index.sets import staged
from index.sets.machines import Selection
from index.store.catalogue import Catalogue, Transaction, timestamp
from index.store.files import Store, disk_errors, flush

MAX_FILE = Limits.upload
"Maximum bytes of a file if upstream does not give its size."

_UNTRUSTED = "do not trust this upstream index; set the environment variable GRACEFARM_PYTHON_INDEX to a different index"


@dataclass(frozen=True, kw_only=True)
class Mirrored:
    """The result for one pin."""

    name: str
    filename: str
    how: str
    "One of: ours, copied, linked, kept."
    size: int


@dataclass(frozen=True, kw_only=True)
class Manner:
    """Options of mirroring a lock."""

    link: bool = False
    "Store absolute links instead of copies."
    selection: Selection = field(default_factory=Selection)
    "The machines whose files to mirror."


@dataclass(frozen=True, kw_only=True)
class _UpstreamFile:
    """One file; the fields have the names of the columns of `mirrored`."""

    filename: str
    project: str
    version: str
    kind: str
    sha256: str
    size: int
    "0: unknown."
    url: str
    "Address of a linked file; empty for a copy."
    metadata_sha256: str | None
    requires_python: str | None
    uploaded: str | None
    defects: str = ""
    "Defects, one line each."
    serves_metadata: bool = True
    "False if METADATA of a linked wheel is stored here for checks of the set, but upstream does not serve it."


def mirror(
    store: Store,
    catalogue: Catalogue,
    actor: str,
    set_name: str,
    lock_name: str,
    pins: list[Pin],
    *,
    index_url: str | None,
    manner: Manner,
    tick: Tick = no_tick,
) -> list[Mirrored]:
    """Mirror the files of the lock into the set. It can be repeated, and continues after an interruption.

    Raises:
        FetchError: the upstream index lacks a pin or does not respond.
        DigestError: upstream sends other bytes than the locked ones.
        UsageError: the set is published, with another lock.
        StoreFullError: the disk is full.
    """
    pins = [pin for pin in pins if manner.selection.needs(pin.marker)]
    _begin(catalogue, actor, set_name, lock_name, pins, manner)
    mirrored: list[Mirrored] = []
    # The default user agent of requests would hide this program's identity.
    with PyPISimple(index_url or PYPI_SIMPLE_ENDPOINT) as upstream, httpx.Client(follow_redirects=True, timeout=60) as client:
        for number, pin in enumerate(pins):
            tick(number, len(pins), pin.name)
            here = _ours(catalogue, actor, set_name, pin, manner) or _kept(store, catalogue, set_name, pin, manner)
            if not here:
                items = _chosen(manner.selection, pin, _upstream(catalogue, upstream, pin))
                here = _take(store, catalogue, actor, set_name, pin, items, client, manner)
            mirrored += here
    tick(len(pins), len(pins), "")
    return mirrored


def _begin(catalogue: Catalogue, actor: str, set_name: str, lock_name: str, pins: list[Pin], manner: Manner) -> None:
    """Register this lock with the set before its first file. The set cannot be published until every pin is fulfilled.

    A set may have several locks, one per index that its wheels come from; the file name identifies a lock. A lock replaces an
    earlier lock with the same name, and files of the earlier lock that no lock of the set names are removed from the set.

    Raises:
        UsageError: the set is published with another lock. (The same lock may be mirrored again to restore lost files.)
    """
    with catalogue.change(actor) as change:
        rows = change.execute("SELECT * FROM pin WHERE set_name = ?", (set_name,)).fetchall()
        known = {_key(row): bool(row["done"]) for row in rows}
        old = {_key(row) for row in rows if row["lock"] == lock_name}
        new = {(pin.name, pin.version, " ".join(sorted(pin.sha256)), manner.link, str(manner.selection)) for pin in pins}
        state = change.execute("SELECT state FROM release_set WHERE name = ?", (set_name,)).fetchone()
        if old == new and state is not None and state["state"] == "published":
            return
        staged.check_staged(change, set_name)
        others = {digest for row in rows if row["lock"] != lock_name for digest in row["sha256"].split()}
        wanted = {digest for pin in pins for digest in pin.sha256} | others
        brought = {digest for _, _, digests, _, _ in old for digest in digests.split()}
        for row in change.execute("SELECT filename, sha256 FROM mirrored WHERE set_name = ?", (set_name,)).fetchall():
            if row["sha256"] not in wanted:
                change.execute("DELETE FROM mirrored WHERE set_name = ? AND filename = ?", (set_name, row["filename"]))
        for digest in brought - wanted:
            change.execute(
                "DELETE FROM member WHERE set_name = ? AND file_id IN (SELECT id FROM file WHERE sha256 = ? AND hidden = 0)",
                (set_name, digest),
            )
        change.execute("DELETE FROM pin WHERE set_name = ? AND lock = ?", (set_name, lock_name))
        for key in new:
            change.execute(
                "INSERT OR REPLACE INTO pin (set_name, lock, project, version, sha256, link, selection, done)"
                " VALUES (?,?,?,?,?,?,?,?)",
                (set_name, lock_name, *key, known.get(key, False)),
            )
        change.note("set.lock", set_name, lock=lock_name, pins=len(pins))


def _key(row: sqlite3.Row) -> tuple[str, str, str, bool, str]:
    return row["project"], row["version"], row["sha256"], bool(row["link"]), row["selection"]


def _finish(change: Transaction, set_name: str, pin: Pin, manner: Manner) -> None:
    change.execute(
        "UPDATE pin SET done = 1 WHERE set_name = ? AND project = ? AND version = ? AND selection = ?",
        (set_name, pin.name, pin.version, str(manner.selection)),
    )


def _ours(catalogue: Catalogue, actor: str, set_name: str, pin: Pin, manner: Manner) -> list[Mirrored]:
    """Add this index's own files with a locked digest to the set."""
    rows = catalogue.rows("SELECT id, filename, sha256, size, requires_python FROM live_file WHERE project = ?", (pin.name,))
    takes = manner.selection.takes
    own = [row for row in rows if row["sha256"] in pin.sha256 and takes(row["filename"], row["requires_python"])]
    members = {row["file_id"] for row in catalogue.rows("SELECT file_id FROM member WHERE set_name = ?", (set_name,))}
    if own and not (members.issuperset(row["id"] for row in own) and _is_done(catalogue, set_name, pin, manner)):
        with catalogue.change(actor) as change:
            staged.check_staged(change, set_name)
            for row in own:
                change.execute("INSERT OR IGNORE INTO member (set_name, file_id) VALUES (?, ?)", (set_name, row["id"]))
            _finish(change, set_name, pin, manner)
            change.note("set.add", f"{set_name} {pin.name}", pin.name)
    return [Mirrored(name=pin.name, filename=row["filename"], how="ours", size=row["size"]) for row in own]


def _is_done(catalogue: Catalogue, set_name: str, pin: Pin, manner: Manner) -> bool:
    row = catalogue.row(
        "SELECT min(done) AS done FROM pin WHERE set_name = ? AND project = ? AND version = ? AND selection = ?",
        (set_name, pin.name, pin.version, str(manner.selection)),
    )
    return row is not None and bool(row["done"])


def _kept(store: Store, catalogue: Catalogue, set_name: str, pin: Pin, manner: Manner) -> list[Mirrored]:
    """The files of an earlier run if they are complete and still stored; else none, so that they are fetched again."""
    rows = [
        row
        for row in catalogue.rows("SELECT * FROM live_mirrored WHERE set_name = ? AND project = ?", (set_name, pin.name))
        if row["sha256"] in pin.sha256
    ]
    if not _is_done(catalogue, set_name, pin, manner) or not all(_is_whole(store, row, link=manner.link) for row in rows):
        return []
    return [Mirrored(name=pin.name, filename=row["filename"], how="kept", size=row["size"]) for row in rows]


def _is_whole(store: Store, row: sqlite3.Row, *, link: bool) -> bool:
    if link or row["url"] is not None:
        return link and row["url"] is not None
    path, meta = store.path(row["sha256"]), row["metadata_sha256"]
    there = path.is_file() and path.stat().st_size == row["size"] and (meta is None or store.path(meta).is_file())
    return there and not row["lost"]


def _upstream(catalogue: Catalogue, upstream: PyPISimple, pin: Pin) -> list[_UpstreamFile]:
    try:
        page = upstream.get_project_page(pin.name)
    except NoSuchProjectError as error:
        raise FetchError(
            f"the upstream index has no project {pin.name}",
            remedy="set the environment variable GRACEFARM_PYTHON_INDEX to an index that has this project",
        ) from error
    except (RequestException, UnsupportedContentTypeError, UnsupportedRepoVersionError) as error:
        raise FetchError(
            f"cannot read the page of {pin.name} on the upstream index: {type(error).__name__}",
            remedy="try again later, or set the environment variable GRACEFARM_PYTHON_INDEX to a different index",
        ) from error
    files = [
        _upstream_file(package, digest, pin)
        for package in page.packages
        if (digest := package.digests.get("sha256", "")) in pin.sha256 and not split_label(package.filename)[1]
    ]
    if not files:
        raise FetchError(
            f"no file of {pin.name} {pin.version} on the upstream index has a sha256 that the lock lists",
            remedy="create the lock again, or set the environment variable GRACEFARM_PYTHON_INDEX to the index from which the"
            " lock was created",
        )
    gone = {row["sha256"] for row in catalogue.rows("SELECT sha256 FROM mirrored WHERE withdrawn IS NOT NULL")}
    left = [item for item in files if item.sha256 not in gone]
    if not left:
        raise RefusedError(
            f"every locked file of {pin.name} {pin.version} was withdrawn from this index",
            remedy="lock a different version, or undo the withdrawal with `index withdraw FILENAME --undo`",
        )
    return left


def _chosen(selection: Selection, pin: Pin, files: list[_UpstreamFile]) -> list[_UpstreamFile]:
    """The wheels that the selection can install, and the sdist for machines without a matching wheel.

    Raises:
        FetchError: no file matches.
    """
    wheels = [item for item in files if item.kind == "bdist_wheel" and selection.takes(item.filename, item.requires_python)]
    left = selection.without(item.filename for item in wheels)
    others = [item for item in files if item.kind != "bdist_wheel" and left.takes(item.filename, item.requires_python)]
    if not wheels and not others:
        raise FetchError(
            f"none of the {len(files)} locked files of {pin.name} {pin.version} matches {selection}",
            remedy="give values of --platform and --python for which the lock has files, or omit these options",
        )
    return [*wheels, *others]


def _upstream_file(package: DistributionPackage, digest: str, pin: Pin) -> _UpstreamFile:
    digests = package.metadata_digests or {}
    return _UpstreamFile(
        filename=package.filename,
        project=pin.name,
        version=_version(package.filename, pin),
        kind="bdist_wheel" if package.filename.endswith(".whl") else "sdist",
        sha256=digest,
        size=package.size or 0,
        url=package.url,
        metadata_sha256=digests.get("sha256") if package.has_metadata else None,
        requires_python=package.requires_python,
        uploaded=timestamp(package.upload_time) if package.upload_time else None,
    )


def _version(filename: str, pin: Pin) -> str:
    """The version in a file name from upstream, if it is the pin's version."""
    try:
        check_plain(filename)
        name, version = parse_wheel_filename(filename)[:2] if filename.endswith(".whl") else parse_sdist_filename(filename)
        same = name == pin.name and version == Version(pin.version)
    except (RefusedError, InvalidWheelFilename, InvalidSdistFilename, InvalidVersion) as error:
        raise FetchError(
            f"the upstream index lists a locked file {filename!r}, which is not a valid name of a wheel or sdist",
            remedy="remove the hash of this file from the lock",
        ) from error
    if not same:
        raise FetchError(
            f"the upstream index lists {filename!r} as a file of {pin.name} {pin.version}, but its name belongs to a "
            "different release",
            remedy=_UNTRUSTED,
        )
    return str(version)


def _take(
    store: Store,
    catalogue: Catalogue,
    actor: str,
    set_name: str,
    pin: Pin,
    items: list[_UpstreamFile],
    client: httpx.Client,
    manner: Manner,
) -> list[Mirrored]:
    """Add all files of a pin in one transaction, so that a pin is never partially fulfilled."""
    with ExitStack() as stack:
        copies: list[tuple[Path, str]] = []
        texts: list[bytes] = []
        rows: list[_UpstreamFile] = []
        for item in items:
            if manner.link:
                row, raw = _linked(store, client, item)
                texts += [raw] if raw is not None else []
                rows.append(row)
                continue
            path = stack.enter_context(_download(store, client, item))
            raw, defects = _inspect(path, item.filename)
            copies.append((path, item.sha256))
            texts += [raw] if raw is not None else []
            digest = hashlib.sha256(raw).hexdigest() if raw is not None else None
            rows.append(replace(item, size=path.stat().st_size, metadata_sha256=digest, url="", defects=defects))
        with catalogue.change(actor) as change:
            for path, sha256 in copies:
                store.adopt(path, sha256)
            for text in texts:
                store.add_bytes(text, hashlib.sha256(text).hexdigest())
            _leave_out(change, set_name, pin, rows)
            for row in rows:
                _insert(change, set_name, row)
            _finish(change, set_name, pin, manner)
    how = "linked" if manner.link else "copied"
    return [Mirrored(name=pin.name, filename=row.filename, how=how, size=row.size) for row in rows]


def _leave_out(change: Transaction, set_name: str, pin: Pin, taken: list[_UpstreamFile]) -> None:
    """Files from an earlier, wider selection of the pin, unless another lock of the set names the pin too."""
    locks = change.execute(
        "SELECT count(*) FROM pin WHERE set_name = ? AND project = ? AND version = ?", (set_name, pin.name, pin.version)
    ).fetchone()[0]
    state = change.execute("SELECT state FROM release_set WHERE name = ?", (set_name,)).fetchone()
    if locks > 1 or state["state"] != "staged":
        return
    names = {row.filename for row in taken}
    for row in change.execute("SELECT * FROM mirrored WHERE set_name = ? AND project = ?", (set_name, pin.name)).fetchall():
        if row["sha256"] in pin.sha256 and row["filename"] not in names and row["withdrawn"] is None:
            change.execute("DELETE FROM mirrored WHERE set_name = ? AND filename = ?", (set_name, row["filename"]))


def _insert(change: Transaction, set_name: str, item: _UpstreamFile) -> None:
    values = {**vars(item), "set_name": set_name, "uploaded": item.uploaded or change.time, "url": item.url or None}
    restored = change.execute(
        "UPDATE mirrored SET lost = 0, url = :url, size = :size, metadata_sha256 = :metadata_sha256, defects = :defects,"
        " serves_metadata = :serves_metadata"
        " WHERE set_name = :set_name AND filename = :filename AND sha256 = :sha256",
        values,
    )
    if not restored.rowcount:
        staged.check_staged(change, set_name)  # files of a published set may be restored, but never changed
        change.execute(
            "INSERT OR REPLACE INTO mirrored (set_name, filename, project, version, kind, sha256, size, metadata_sha256,"
            " requires_python, uploaded, url, defects, serves_metadata) VALUES (:set_name, :filename, :project, :version,"
            " :kind, :sha256, :size, :metadata_sha256, :requires_python, :uploaded, :url, :defects, :serves_metadata)",
            values,
        )
    change.note("set.mirror", f"{set_name} {item.filename}", sha256=item.sha256, linked=bool(item.url))


def withdraw(catalogue: Catalogue, actor: str, filename: str, reason: str, *, undo: bool = False) -> list[str]:
    """Remove a mirrored file from every set, including published ones, and answer 410 for it; return the sets.

    Raises:
        UsageError: no set has such a file.
    """
    with catalogue.change(actor) as change:
        rows = change.execute(
            "UPDATE mirrored SET withdrawn = ? WHERE filename = ? AND (withdrawn IS NULL) = ? RETURNING set_name",
            (None if undo else change.time, filename, not undo),
        ).fetchall()
        if not rows:
            raise UsageError(
                f"no set has a {'withdrawn' if undo else 'mirrored'} file {filename!r}",
                remedy="give a file that `index stage list --json` lists; for a file that was uploaded to this index, use"
                " `index yank` or `index delete`",
            )
        names = sorted(row["set_name"] for row in rows)
        change.note("set.unwithdraw" if undo else "set.withdraw", filename, sets=names, reason=reason)
    return names


@contextmanager
def _download(store: Store, client: httpx.Client, item: _UpstreamFile) -> Iterator[Path]:
    digest = hashlib.sha256()
    bound, count = item.size or MAX_FILE, 0
    # The bytes are hashed and stored as sent, so a content coding would change the file.
    identity = {"Accept-Encoding": "identity"}
    with store.staged() as path:
        try:
            with (
                disk_errors(store.root),
                path.open("xb") as stream,
                client.stream("GET", item.url, headers=identity) as answer,
            ):
                answer.raise_for_status()
                for chunk in answer.iter_raw():
                    count += len(chunk)
                    if count > bound:
                        raise DigestError(
                            f"the upstream index sends more than {bound} bytes for {item.filename}",
                            remedy=_UNTRUSTED,
                        )
                    digest.update(chunk)
                    stream.write(chunk)
                flush(stream)
        except httpx.HTTPError as error:
            raise FetchError(
                f"failed to fetch {item.filename} from upstream: {error}",
                remedy="repeat the command, which continues with this file",
            ) from error
        if digest.hexdigest() != item.sha256:
            raise DigestError(
                f"the upstream index sent {item.filename} with sha256 {digest.hexdigest()}, but {item.sha256} was expected",
                remedy=_UNTRUSTED,
            )
        yield path


def _inspect(path: Path, filename: str) -> tuple[bytes | None, str]:
    """METADATA of a wheel, and the defects of a file. The file must pass the checks of an import.

    Raises:
        RefusedError: with this file, installers would fail on the whole project, or it is dangerous.
    """
    defects = Defects(distribution=parse_mirrored(filename))
    if defects.distribution.kind == "sdist":
        sdist.inspect(path, defects)
        return None, "\n".join(defects.sentences)
    read, _, _ = wheel.inspect(path, defects, locked=True)
    return read.raw, "\n".join(defects.sentences)


def _linked(store: Store, client: httpx.Client, item: _UpstreamFile) -> tuple[_UpstreamFile, bytes | None]:
    """The row of a linked file, with its defects, and METADATA of a wheel. The file is fetched, checked and deleted.

    Raises:
        RefusedError: with this file, installers would fail on the whole project, or it is dangerous.
        FetchError, DigestError: upstream does not send the file, or sends other bytes, or serves other METADATA (PEP 658).
    """
    with _download(store, client, item) as path:
        inside, defects = _inspect(path, item.filename)
        digest = hashlib.sha256(inside).hexdigest() if inside is not None else None
        size = path.stat().st_size
    served = item.metadata_sha256 if inside is not None else None
    if served is not None and served != digest:
        raise DigestError(
            f"the upstream index serves metadata of {item.filename} that differs from METADATA in the file", remedy=_UNTRUSTED
        )
    return replace(item, size=size, metadata_sha256=digest, serves_metadata=served is not None, defects=defects), inside
