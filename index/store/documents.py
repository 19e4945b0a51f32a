"""Documents that are put beside records: matrices of cells and certificates (docs/index-records.md).

Each is kept as the bytes that were sent, in the store, with a row in the catalogue; a later one replaces an earlier one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

from packaging.utils import InvalidWheelFilename, parse_wheel_filename
from packaging.version import InvalidVersion

from gracefarm.variants import split_label
from index.errors import ForbiddenError, RefusedError
from index.store.auth import Token, allow
from index.store.catalogue import Catalogue
from index.store.files import Store

if TYPE_CHECKING:
    from index.store.schemas import DeviceCertificate, MatrixDocument, SentDocument

    Sent = TypeVar("Sent", bound=SentDocument)

_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?\Z")
_DIGEST = re.compile(r"[0-9a-f]{64}\Z")


def check_matrix_name(name: str) -> str:
    """`name`, when it can name a matrix.

    Raises:
        RefusedError: it cannot.
    """
    if not _NAME.match(name):
        raise RefusedError(f"{name!r} cannot name a matrix", remedy="use up to 64 of a-z, 0-9, '.', '_', '-'")
    return name


def check_digest(digest: str) -> str:
    """`digest`, when it can be one of device code.

    Raises:
        RefusedError: it cannot.
    """
    if not _DIGEST.match(digest):
        raise RefusedError(f"{digest!r} is not a device digest", remedy="write it as 64 hexadecimal digits, in lower case")
    return digest


def parse_matrix(raw: bytes, name: str) -> MatrixDocument:
    """The matrix of these bytes, which is for that name.

    Raises:
        RefusedError: the bytes are not of the schema, or the document is called otherwise.
    """
    from index.store.schemas import MatrixDocument

    document = _parse(raw, MatrixDocument, "matrix", "send what `builder matrix --json` prints")
    if document.name != name:
        raise RefusedError(f"the matrix calls itself {document.name!r}", remedy=f"put it to /matrix/{document.name}")
    return document


def parse_certificate(raw: bytes, digest: str) -> DeviceCertificate:
    """The certificate of these bytes, which is for that device digest.

    Raises:
        RefusedError: the bytes are not of the schema, or the certificate is for another digest.
    """
    from index.store.schemas import DeviceCertificate

    document = _parse(raw, DeviceCertificate, "certificate", "see docs/index-records.md for the keys")
    if document.device_digest != digest:
        raise RefusedError(
            f"the certificate is for device digest {document.device_digest}",
            remedy=f"put it to /certificates/{document.device_digest}",
        )
    return document


def _parse(raw: bytes, model: type[Sent], kind: str, remedy: str) -> Sent:
    from pydantic import ValidationError

    try:
        return model.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        others = f" ({error.error_count() - 1} more)" if error.error_count() > 1 else ""
        where = f"{place}: " if place else ""
        raise RefusedError(f"the {kind} is not of its schema: {where}{first['msg']}{others}", remedy=remedy) from None


def put_matrix(store: Store, catalogue: Catalogue, token: Token, raw: bytes, document: MatrixDocument) -> None:
    """Keep a matrix under its name.

    A token for one project reaches a matrix of that project alone; a token for one view reaches the matrix of the view's name.

    Raises:
        ForbiddenError: the token does not reach the matrix, or not the one that it would replace.
    """
    projects = document.projects()
    with catalogue.change(token.actor) as change:
        if token.set_name not in (None, document.name):
            raise ForbiddenError(
                f"the token {token.name!r} is for {token.set_name} alone", remedy=f"put it to /matrix/{token.set_name}"
            )
        row = change.execute("SELECT projects FROM matrix WHERE name = ?", (document.name,)).fetchone()
        replaced = row["projects"].split() if row is not None else []
        for project in sorted({*projects, *replaced}):
            allow(token, project=project, set_name=token.set_name)
        digest = _keep(store, raw)
        change.execute(
            "INSERT OR REPLACE INTO matrix (name, projects, document_sha256, document_size, updated) VALUES (?, ?, ?, ?, ?)",
            (document.name, " ".join(sorted(projects)), digest, len(raw), change.time),
        )
        change.note("matrix.put", document.name, sha256=digest, cells=len(document.cells))


def put_certificate(store: Store, catalogue: Catalogue, token: Token, raw: bytes, document: DeviceCertificate) -> None:
    """Keep a certificate under its device digest. A token for one project reaches certificates of its wheels alone.

    Raises:
        RefusedError: the wheel's name is no wheel's name.
        ForbiddenError: the token does not reach the wheel's project, or not that of the certificate that it would replace.
    """
    try:
        project = str(parse_wheel_filename(split_label(document.wheel.filename)[0])[0])
    except (InvalidWheelFilename, InvalidVersion) as error:
        raise RefusedError(f"the certificate is not of its schema: wheel.filename: {error}", remedy="see PEP 427") from None
    with catalogue.change(token.actor) as change:
        row = change.execute("SELECT project FROM certificate WHERE digest = ?", (document.device_digest,)).fetchone()
        for name in (project, row["project"] if row is not None else project):
            allow(token, project=name)
        digest = _keep(store, raw)
        change.execute(
            "INSERT OR REPLACE INTO certificate (digest, project, wheel_sha256, document_sha256, document_size, updated)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            (document.device_digest, project, document.wheel.sha256, digest, len(raw), change.time),
        )
        rows = change.execute("SELECT DISTINCT project FROM file WHERE sha256 = ?", (document.wheel.sha256,)).fetchall()
        projects = {project, *(row["project"] for row in rows)}  # the pages of wheels with the same device code change too
        change.note("certificate.put", document.device_digest, *sorted(projects), sha256=digest)


def _keep(store: Store, raw: bytes) -> str:
    digest = hashlib.sha256(raw).hexdigest()
    store.add_bytes(raw, digest)
    return digest


def matrices(store: Store, catalogue: Catalogue) -> list[MatrixDocument]:
    """Every matrix that can be read, by name."""
    rows = catalogue.rows("SELECT name, document_sha256 FROM matrix ORDER BY name")
    return list(_readable(store, [(row["name"], row["document_sha256"]) for row in rows], parse_matrix))


def certificates(
    store: Store, catalogue: Catalogue, wheel_sha256: str, device_digests: Collection[str]
) -> list[DeviceCertificate]:
    """Certificates of this wheel, and those of wheels with the same device code."""
    marks = ", ".join("?" * len(device_digests))
    rows = catalogue.rows(
        f"SELECT digest, document_sha256 FROM certificate WHERE wheel_sha256 = ? OR digest IN ({marks}) ORDER BY digest",  # noqa: S608 - question marks
        (wheel_sha256, *sorted(device_digests)),
    )
    return list(_readable(store, [(row["digest"], row["document_sha256"]) for row in rows], parse_certificate))


def _readable(store: Store, documents: list[tuple[str, str]], parse: Callable[[bytes, str], Sent]) -> Iterator[Sent]:
    """Documents, given by name and digest; without those that are lost (`fsck` tells) or of an older schema."""
    for name, digest in documents:
        with suppress(OSError, RefusedError):
            yield parse(store.path(digest).read_bytes(), name)
