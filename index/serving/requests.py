"""What the handlers of several addresses use: the client, its token, the body of a request, and a stored file as response."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response

from index.errors import DamagedError, TooLargeError, UnauthenticatedError
from index.intake.multipart import pieces
from index.serving.download import FileAnswer
from index.serving.proxies import client_address
from index.serving.service import IndexService
from index.simple_api import negotiate
from index.store import auth, records
from index.store.auth import Token

IMMUTABLE = "public, max-age=31536000, immutable"


def client_of(service: IndexService, request: Request) -> str:
    """Address of the client, resolved through trusted proxies."""
    return client_address(request.scope, service.options.trusted_proxies)


async def identify(service: IndexService, request: Request) -> Token:
    """The request's token.

    Raises:
        UnauthenticatedError, TooManyError: the token is missing or invalid, or the address sent too many invalid ones.
    """
    client, authorization = client_of(service, request), request.headers.get("authorization")
    service.gate.write(client)
    try:
        if not auth.is_user(authorization):
            return auth.identify(service.catalogue, authorization)
        service.gate.guessing(client)
        return await asyncio.get_running_loop().run_in_executor(
            service.workers, auth.identify_user, service.catalogue, authorization, service.passwords
        )
    except UnauthenticatedError:
        service.gate.failure(client)
        raise


async def body_of(service: IndexService, request: Request) -> bytes:
    """The whole body of a request, up to the limit for records."""
    body = bytearray()
    async for piece in pieces(request.receive, service.limits):
        body += piece
        if len(body) > records.MAX_RECORD:
            raise TooLargeError(
                f"records and logs may have at most {records.MAX_RECORD} bytes", remedy="shorten the record or the log"
            )
    return bytes(body)


def send_stored(service: IndexService, request: Request, sha256: str, media: str, *, cache: str = IMMUTABLE) -> Response:
    """The stored bytes of that digest, with ranges and 304.

    Raises:
        DamagedError: the bytes are missing from the store.
    """
    etag = f'"{sha256}"'
    headers = {"ETag": etag, "Cache-Control": cache, "Accept-Ranges": "bytes"}
    match = request.headers.get("if-none-match")
    if match and negotiate.names_etag(match, etag):
        return Response(status_code=304, headers=headers)
    path = service.store.path(sha256)
    try:
        status = path.stat()
    except FileNotFoundError:
        raise DamagedError(
            "the store has lost this file", remedy="upload the file again; `index fsck` lists all lost files"
        ) from None
    return FileAnswer(path, service.downloads, stat_result=status, media_type=media, headers=headers)
