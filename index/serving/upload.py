"""The legacy upload API as twine and `uv publish` speak it."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass

from packaging.utils import canonicalize_name
from starlette.requests import Request
from starlette.types import Receive

from index.errors import RefusedError
from index.intake import admission
from index.intake.admission import Admission, Destination
from index.intake.multipart import DIGESTS, Form, Received, receive_form
from index.names import Distribution, parse_filename, same_version
from index.serving.service import IndexService
from index.store import auth
from index.store.auth import Token
from index.trust import publishers


@dataclass(frozen=True, kw_only=True)
class Upload:
    """What was taken in."""

    filename: str
    sha256: str
    outcome: Admission

    @property
    def sentence(self) -> str:
        """One line for the client."""
        if self.outcome == "created":
            return f"{self.filename} is published"
        return f"{self.filename} was here already, with the same bytes"


async def take(service: IndexService, token: Token, destination: Destination, request: Request, receive: Receive) -> Upload:
    """Receive, check and publish one file; what this returns is durable.

    Raises:
        RefusalError: why not, with its HTTP status. Nothing of the upload remains.
    """
    headers = request.headers
    length = headers.get("content-length")
    number = int(length) if length is not None and length.isascii() and length.isdigit() else None
    service.check_space(number or 0)
    form = await receive_form(headers.get("content-type", ""), number, receive, service.store, service.limits, service.workers)
    loop = asyncio.get_running_loop()
    try:
        received, distribution = _check_form(form, request.query_params.get(":action", ""))
        auth.allow(token, project=distribution.project, set_name=destination.scope)
        await loop.run_in_executor(service.workers, _check_digests, form, received)
        sha256 = received.digests["sha256_digest"]
        admission.check_wanted(service.catalogue, distribution, sha256, destination)
        candidate = await loop.run_in_executor(service.workers, admission.inspect, received.path, distribution, sha256)
        provenance = None
        if attestations := form.value("attestations"):
            provenance = await loop.run_in_executor(service.verifier, _provenance, service, attestations, distribution, sha256)
        outcome = await loop.run_in_executor(
            service.writer, admission.admit, service.store, service.catalogue, token.actor, candidate, destination, provenance
        )
    finally:
        form.discard()
    await loop.run_in_executor(service.writer, service.catalogue.tidy)
    service.page_cache.refresh(now=True)
    return Upload(filename=distribution.filename, sha256=sha256, outcome=outcome)


def _check_form(form: Form, queried: str) -> tuple[Received, Distribution]:
    """The file and what its name says, when the form says the same. PyPI takes the action from the query too (`queried`).

    Raises:
        RefusedError: it does not.
    """
    action = form.value(":action") or queried
    if action != "file_upload":
        raise RefusedError(f"the action {action!r} is not known", remedy="send :action=file_upload, as twine and uv do")
    if form.value("protocol_version") not in ("", "1"):
        raise RefusedError("the protocol version is not 1", remedy="send protocol_version=1, as twine and uv do")
    received = form.files.get("content")
    if received is None:
        raise RefusedError("the form holds no file named content", remedy="send the distribution as the field content")
    distribution = parse_filename(received.filename)
    name, version, filetype = form.value("name"), form.value("version"), form.value("filetype")
    if name and canonicalize_name(name) != distribution.project:
        raise RefusedError(
            f"the form says project {name!r}, the file is {distribution.filename}", remedy="upload it under its own name"
        )
    if version and not same_version(version, distribution.version):
        raise RefusedError(
            f"the form says version {version!r}, the file is {distribution.filename}", remedy="upload it under its own version"
        )
    if filetype and filetype != distribution.kind:
        raise RefusedError(
            f"the form says {filetype!r}, the file is {distribution.filename}", remedy=f"send filetype={distribution.kind}"
        )
    return received, distribution


def _provenance(service: IndexService, attestations: str, distribution: Distribution, sha256: str) -> bytes:
    """What the form's attestations say of the file (PEP 740).

    Raises:
        RefusedError, UnreachableError: one of them is not good, or cannot be verified now.
    """
    trusted = publishers.of_project(service.catalogue, distribution.project)
    return service.attestations.provenance(attestations, distribution.filename, sha256, trusted)


def _check_digests(form: Form, received: Received) -> None:
    """Every digest that the form announces, in whatever order its parts came."""
    for field, new_hash in DIGESTS.items():
        announced = form.value(field).lower()
        if announced and field not in received.digests:
            with received.path.open("rb") as stream:
                received.digests[field] = hashlib.file_digest(stream, new_hash).hexdigest()
        if announced and announced != received.digests[field]:
            raise RefusedError(
                f"the {field} of the form is not that of the file received ({received.digests[field]})",
                remedy="the upload was damaged; upload it again",
            )
