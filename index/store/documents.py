"""Documents besides records: matrices of cells, and certificates (docs/reference/index-records.md).

The store keeps each document byte for byte, with a row in the catalogue. A later document replaces an earlier one.
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
    """Return `name` if it is a valid name for a matrix.

    Raises:
        RefusedError: it is not.
    """
    if not _NAME.match(name):
        raise RefusedError(
            f"{name!r} is not a valid name for a matrix",
            remedy="use at most 64 characters of a-z, 0-9, '.', '_' and '-'; begin and end with a letter or digit",
        )
    return name


def check_digest(digest: str) -> str:
    """Return `digest` if it has the form of a device digest.

    Raises:
        RefusedError: it has not.
    """
    if not _DIGEST.match(digest):
        raise RefusedError(f"{digest!r} is not a device digest", remedy="write 64 hexadecimal digits, in lower case")
    return digest


def parse_matrix(raw: bytes, name: str) -> MatrixDocument:
    """Parse a matrix and check that it has that name.

    Raises:
        RefusedError: the bytes do not match the schema, or the document has another name.
    """
    from index.store.schemas import MatrixDocument

    document = _parse(raw, MatrixDocument, "matrix", "send the output of `builder matrix --json`")
    if document.name != name:
        raise RefusedError(
            f"the matrix is named {document.name!r}, but the address has the name {name!r}",
            remedy=f"send the matrix to /matrix/{document.name}",
        )
    return document


def parse_certificate(raw: bytes, digest: str) -> DeviceCertificate:
    """Parse a certificate and check that it is for that device digest.

    Raises:
        RefusedError: the bytes do not match the schema, or the certificate is for another digest.
    """
    from index.store.schemas import DeviceCertificate

    document = _parse(
        raw,
        DeviceCertificate,
        "certificate",
        "send a certificate of `builder certify`; docs/reference/index-records.md describes its keys",
    )
    if document.device_digest != digest:
        raise RefusedError(
            f"the certificate is for device digest {document.device_digest}, but the address has digest {digest}",
            remedy=f"send the certificate to /certificates/{document.device_digest}",
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
        raise RefusedError(f"the {kind} does not match its schema: {where}{first['msg']}{others}", remedy=remedy) from None


def put_matrix(store: Store, catalogue: Catalogue, token: Token, raw: bytes, document: MatrixDocument) -> None:
    """Store a matrix under its name.

    A token for one project covers matrices of only that project; a token for one view covers the matrix with the view's name.

    Raises:
        ForbiddenError: the token does not cover the matrix, or the matrix that it would replace.
    """
    projects = document.projects()
    with catalogue.change(token.actor) as change:
        if token.set_name not in (None, document.name):
            raise ForbiddenError(
                f"the token {token.name!r} is only for {token.set_name}",
                remedy=f"send the matrix to /matrix/{token.set_name}, or use a different token",
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
    """Store a certificate under its device digest. A token for one project covers only certificates of that project's wheels.

    Raises:
        RefusedError: the certificate's wheel has an invalid name.
        ForbiddenError: the token does not cover the wheel's project, or the project of the certificate to be replaced.
    """
    try:
        project = str(parse_wheel_filename(split_label(document.wheel.filename)[0])[0])
    except (InvalidWheelFilename, InvalidVersion) as error:
        raise RefusedError(
            f"the certificate does not match its schema: wheel.filename: {error}",
            remedy="name a wheel: NAME-VERSION-PYTHON-ABI-PLATFORM.whl (PEP 427)",
        ) from None
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
        projects = {project, *(row["project"] for row in rows)}  # pages of wheels with the same device code change too
        change.note("certificate.put", document.device_digest, *sorted(projects), sha256=digest)


def _keep(store: Store, raw: bytes) -> str:
    digest = hashlib.sha256(raw).hexdigest()
    store.add_bytes(raw, digest)
    return digest


def matrices(store: Store, catalogue: Catalogue) -> list[MatrixDocument]:
    """Every readable matrix, by name."""
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
    """Load documents, given by name and digest; skip those that are lost (`fsck` reports them) or have an older schema."""
    for name, digest in documents:
        with suppress(OSError, RefusedError):
            yield parse(store.path(digest).read_bytes(), name)
