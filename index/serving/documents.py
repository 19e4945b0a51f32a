"""Matrices of cells and certificates over HTTP: GET is public, PUT requires a token."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from index.errors import NotFoundError
from index.serving.requests import body_of, client_of, identify, send_stored
from index.serving.service import IndexService
from index.store import documents
from index.store.auth import Token
from index.store.catalogue import Catalogue
from index.store.files import Store

Sent = TypeVar("Sent")


def routes(service: IndexService) -> list[Route]:
    """/matrix/NAME and /certificates/DIGEST."""
    methods = ["GET", "HEAD", "PUT"]
    return [
        Route("/matrix/{matrix}", partial(matrix, service), methods=methods),
        Route("/certificates/{digest}", partial(certificate, service), methods=methods),
    ]


async def matrix(service: IndexService, request: Request) -> Response:
    """GET, PUT /matrix/NAME: the cells that the board shows."""
    name = documents.check_matrix_name(request.path_params["matrix"])
    if request.method in ("GET", "HEAD"):
        row = service.catalogue.row("SELECT document_sha256 FROM matrix WHERE name = ?", (name,))
        return _send(service, request, row["document_sha256"] if row is not None else None, f"matrix {name!r}")

    await _put(service, request, partial(documents.parse_matrix, name=name), documents.put_matrix)
    return PlainTextResponse(f"matrix {name} is stored\n")


async def certificate(service: IndexService, request: Request) -> Response:
    """GET, PUT /certificates/DIGEST: device code whose results on a GPU match a reference."""
    digest = documents.check_digest(request.path_params["digest"])
    if request.method in ("GET", "HEAD"):
        row = service.catalogue.row("SELECT document_sha256 FROM certificate WHERE digest = ?", (digest,))
        return _send(service, request, row["document_sha256"] if row is not None else None, f"certificate of {digest}")

    await _put(service, request, partial(documents.parse_certificate, digest=digest), documents.put_certificate)
    return PlainTextResponse(f"certificate {digest} is stored\n")


async def _put(
    service: IndexService,
    request: Request,
    parse: Callable[[bytes], Sent],
    keep: Callable[[Store, Catalogue, Token, bytes, Sent], None],
) -> None:
    token = await identify(service, request)
    loop = asyncio.get_running_loop()
    async with service.gate.upload(client_of(service, request)):
        raw = await body_of(service, request)
        document = await loop.run_in_executor(service.workers, parse, raw)
        await loop.run_in_executor(service.writer, keep, service.store, service.catalogue, token, raw, document)
    service.page_cache.refresh(now=True)


def _send(service: IndexService, request: Request, digest: str | None, what: str) -> Response:
    if digest is None:
        raise NotFoundError(
            f"this index has no {what}", remedy="open the page /board/ of this index, which lists the builds and matrices"
        )
    return send_stored(service, request, digest, "application/json", cache="no-cache")
