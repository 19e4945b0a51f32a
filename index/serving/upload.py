"""The legacy upload API that twine and `uv publish` use."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass
from functools import partial

from packaging.utils import canonicalize_name
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive

from index.errors import RefusalError, RefusedError
from index.intake import admission
from index.intake.admission import Admission, Destination
from index.intake.multipart import DIGESTS, Form, Received, receive_form
from index.names import Distribution, parse_filename, same_version
from index.serving.draining import Body, drain
from index.serving.requests import client_of, identify
from index.serving.service import IndexService
from index.store import auth
from index.store.auth import Token
from index.trust import publishers


@dataclass(frozen=True, kw_only=True)
class Upload:
    """An accepted file."""

    filename: str
    sha256: str
    outcome: Admission

    @property
    def sentence(self) -> str:
        """One line for the client."""
        if self.outcome == "created":
            return f"{self.filename} is published"
        return f"{self.filename} already exists with the same bytes"


def routes(service: IndexService) -> list[Route]:
    """/legacy/, /nightly/legacy/ and /stage/SET/legacy/."""
    answer = partial(legacy, service)
    return [
        Route("/legacy/", answer, methods=["POST"]),
        Route("/legacy", answer, methods=["POST"]),
        Route("/nightly/legacy/", answer, methods=["POST"]),
        Route("/stage/{set_name}/legacy/", answer, methods=["POST"]),
    ]


def at_root(service: IndexService) -> Route:
    """POST /, as in pypiserver. It comes after the web page at the same address."""
    return Route("/", partial(legacy, service), methods=["POST"])


async def legacy(service: IndexService, request: Request) -> Response:
    """POST /legacy/, /nightly/legacy/, /stage/SET/legacy/, and / as in pypiserver."""
    set_name = request.path_params.get("set_name")
    body = Body(request.receive)
    destination = Destination(
        set_name=set_name,
        channel="nightly" if request.url.path.startswith("/nightly/") else "release",
        allow_new=service.options.allow_new,
        variants=service.options.variants,
    )
    try:
        token = await identify(service, request)
        # Only the set is checked before the body is read. The form names the project later; `take` checks that.
        auth.allow_set(token, destination.scope)
        async with service.gate.upload(client_of(service, request)):
            upload = await take(service, token, destination, request, body)
    except RefusalError as error:
        service.metrics.uploads[str(error.status)] += 1
        await drain(body, service.limits.idle)
        raise
    service.metrics.uploads[upload.outcome] += 1
    return PlainTextResponse(upload.sentence + "\n", headers={"X-Sha256": upload.sha256})


async def take(service: IndexService, token: Token, destination: Destination, request: Request, receive: Receive) -> Upload:
    """Receive, check and publish one file. When this returns, the file is durable.

    Raises:
        RefusalError: the reason, with its HTTP status. Nothing of the upload remains.
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
    """The file and its parsed name, checked against the form. Like PyPI, take the action from the query too (`queried`).

    Raises:
        RefusedError: the form differs from the file name.
    """
    action = form.value(":action") or queried
    if action != "file_upload":
        raise RefusedError(f"unknown action {action!r}", remedy="send :action=file_upload, as twine and uv do")
    if form.value("protocol_version") not in ("", "1"):
        raise RefusedError("the protocol version is not 1", remedy="send protocol_version=1, as twine and uv do")
    received = form.files.get("content")
    if received is None:
        raise RefusedError("the form has no file in the field content", remedy="send the distribution in the field content")
    distribution = parse_filename(received.filename)
    name, version, filetype = form.value("name"), form.value("version"), form.value("filetype")
    if name and canonicalize_name(name) != distribution.project:
        raise RefusedError(
            f"the form names the project {name!r}, but the file is {distribution.filename}",
            remedy="send the project name that the file name contains",
        )
    if version and not same_version(version, distribution.version):
        raise RefusedError(
            f"the form names the version {version!r}, but the file is {distribution.filename}",
            remedy="send the version that the file name contains",
        )
    if filetype and filetype != distribution.kind:
        raise RefusedError(
            f"the form names the type {filetype!r}, but the file is {distribution.filename}",
            remedy=f"send filetype={distribution.kind}",
        )
    return received, distribution


def _provenance(service: IndexService, attestations: str, distribution: Distribution, sha256: str) -> bytes:
    """The provenance from the form's attestations (PEP 740).

    Raises:
        RefusedError, UnreachableError: an attestation is invalid, or cannot be verified now.
    """
    trusted = publishers.of_project(service.catalogue, distribution.project)
    return service.attestations.provenance(attestations, distribution.filename, sha256, trusted)


def _check_digests(form: Form, received: Received) -> None:
    """Check every digest that the form announces, in any order of its parts."""
    for field, new_hash in DIGESTS.items():
        announced = form.value(field).lower()
        if announced and field not in received.digests:
            with received.path.open("rb") as stream:
                received.digests[field] = hashlib.file_digest(stream, new_hash).hexdigest()
        if announced and announced != received.digests[field]:
            raise RefusedError(
                f"the {field} in the form differs from the digest of the received file ({received.digests[field]})",
                remedy="upload the file again, since the transfer was damaged",
            )
