"""The shared cache over HTTP: GET without a token, PUT with one."""

from __future__ import annotations

import asyncio
from functools import partial

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from index.errors import TooLargeError
from index.intake.multipart import pieces
from index.serving.requests import client_of, identify
from index.serving.service import IndexService
from index.store import auth
from index.store.cache import MAX_ENTRY, EntryStore


def routes(service: IndexService) -> list[Route]:
    """/cache/KIND/RECIPE/KEY."""
    entries = EntryStore(service.store, service.options.cache_size)
    answer = partial(entry, service, entries)
    return [Route("/cache/{kind}/{recipe}/{key}", answer, methods=["GET", "HEAD", "PUT"])]


async def entry(service: IndexService, entries: EntryStore, request: Request) -> Response:
    """An entry of the compiler cache, as its writer signed it."""
    place = (request.path_params["kind"], request.path_params["recipe"], request.path_params["key"])
    loop = asyncio.get_running_loop()
    if request.method in ("GET", "HEAD"):
        content = await loop.run_in_executor(service.workers, entries.read, *place)
        return Response(content, media_type="application/octet-stream", headers={"Cache-Control": "no-store"})
    token = await identify(service, request)
    auth.allow(token, set_name=auth.CACHE)
    async with service.gate.upload(client_of(service, request)):
        entries.path(*place)
        body = bytearray()
        async for piece in pieces(request.receive, service.limits):
            body += piece
            if len(body) > MAX_ENTRY:
                raise TooLargeError(
                    f"cache entries of more than {MAX_ENTRY} bytes are refused",
                    remedy="compile this object on each machine, since the index cannot share it",
                )
        service.check_space(len(body))
        await loop.run_in_executor(service.writer, entries.keep, *place, bytes(body))
    return PlainTextResponse("the entry is kept\n")
