"""Trusted publishing over HTTP (PEP 807, a draft): discovery, audience, and the exchange of an identity token."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from functools import partial

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from index.errors import NotAcceptableError, NotFoundError, RefusalError, RefusedError, UnauthenticatedError, sentence
from index.intake.multipart import pieces
from index.serving.requests import client_of
from index.serving.service import IndexService
from index.simple_api import negotiate
from index.store import auth
from index.trust import publishers
from index.trust.exchange import exchange

MEDIA = "application/vnd.pypi.pytp.v1+json"

FEATURE = "multi-use-token"
"The only supported kind of minted upload token: valid for every upload until it expires."

LONGEST = 64 << 10
"Maximum bytes of a request for a token."

_UPLOADS = re.compile(r"/|/legacy/?|/nightly/legacy/?|/stage/[^/]+/legacy/?")

Handler = Callable[[Request], Awaitable[Response]]


def routes(service: IndexService, base: Callable[[Request], str]) -> list[Route]:
    """/.well-known/pytp and its endpoints. They have the same paths as on PyPI, since uv uses those paths without discovery.

    `base` is the address that the client uses for this index.
    """
    return [
        Route("/.well-known/pytp", _answering(partial(discovery, service, base))),
        Route("/_/oidc/audience", _answering(partial(audience, service))),
        Route("/_/oidc/mint-token", _answering(partial(mint_token, service)), methods=["POST"]),
        Route("/_/oidc/burn-token", _answering(partial(burn_token, service)), methods=["POST"]),
    ]


async def discovery(service: IndexService, base: Callable[[Request], str], request: Request) -> Response:
    """GET /.well-known/pytp?discover=PATH: the address that exchanges tokens for uploads to that path.

    Raises:
        NotFoundError: the path is not for uploads, or no project has a publisher.
    """
    path = request.query_params.get("discover", "")
    if not _UPLOADS.fullmatch(path) or not publishers.all_publishers(service.catalogue):
        raise NotFoundError(
            f"{path[:200]!r} does not support trusted publishing", remedy="give an upload path, such as ?discover=%2Flegacy%2F"
        )
    address = base(request)
    return JSONResponse(
        {
            "audience-endpoint": f"{address}/_/oidc/audience",
            "token-mint-endpoint": f"{address}/_/oidc/mint-token",
            "features": [FEATURE],
            "default-features": [FEATURE],
        },
        media_type=MEDIA,
    )


async def audience(service: IndexService, _request: Request) -> Response:
    """GET /_/oidc/audience: the audience that an identity token must name.

    Raises:
        NotFoundError: no project has a publisher.
    """
    return JSONResponse({"audience": publishers.audience(service.catalogue)}, media_type=MEDIA)


async def mint_token(service: IndexService, request: Request) -> Response:
    """POST /_/oidc/mint-token: exchange an identity token for a short-lived upload token.

    Raises:
        UnauthenticatedError, ForbiddenError, UnreachableError, NotFoundError: see `index.trust.exchange`.
        TooManyError: this address had too many refused tokens.
    """
    client = client_of(service, request)
    service.gate.write(client)
    text = await _token_of(service, request)
    loop = asyncio.get_running_loop()
    try:
        minted = await loop.run_in_executor(service.exchanger, exchange, service.catalogue, service.issuer_keys, text)
    except UnauthenticatedError:
        service.gate.failure(client)
        raise
    return JSONResponse({"success": True, "token": minted.secret, "expires": minted.expires}, media_type=MEDIA)


async def burn_token(service: IndexService, request: Request) -> Response:
    """POST /_/oidc/burn-token: revoke a token; uv calls it after uploads. Always 202, so that tokens cannot be guessed."""
    service.gate.write(client_of(service, request))
    text = await _token_of(service, request)
    await asyncio.get_running_loop().run_in_executor(service.writer, auth.burn, service.catalogue, text)
    return JSONResponse({"message": "Accepted"}, status_code=202, media_type=MEDIA)


async def _token_of(service: IndexService, request: Request) -> str:
    """The token in a request's body.

    Raises:
        RefusedError: the token is missing, or the request names a feature that this index does not support.
    """
    body = bytearray()
    async for piece in pieces(request.receive, service.limits):
        body += piece
        if len(body) > LONGEST:
            raise RefusedError(f"the request has more than {LONGEST} bytes", remedy="send only the token")
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        document = None
    token = document.get("token") if isinstance(document, dict) else None
    if not isinstance(token, str):
        raise RefusedError("the request has no token", remedy='send a JSON object such as {"token": "ey…"}')
    wanted = document.get("features", [FEATURE]) if isinstance(document, dict) else []
    if wanted != [FEATURE]:
        raise RefusedError(f"this index supports only the feature {FEATURE}", remedy="omit `features`")
    return token


def _answering(handler: Handler) -> Handler:
    """Wrap a handler: check Accept, and report refusals as RFC 9457 problems, which twine and uv read."""

    async def answer(request: Request) -> Response:
        try:
            if not negotiate.accepts(request.headers.get("accept"), MEDIA, "application/json"):
                raise NotAcceptableError(f"this address returns {MEDIA}", remedy="send this type in the header Accept")
            answer = await handler(request)
        except RefusalError as error:
            answer = _problem(error)
        answer.headers["Cache-Control"] = "no-store"
        return answer

    return answer


def _problem(error: RefusalError) -> Response:
    detail = sentence(error)
    document = {
        "type": "about:blank",
        "title": type(error).__name__.removesuffix("Error"),
        "status": error.status,
        "detail": detail,
        "message": detail,
        "errors": [{"code": f"http-{error.status}", "description": detail}],
    }
    headers = {"Retry-After": "5"} if error.status in (424, 429) else {}
    return JSONResponse(document, status_code=error.status, headers=headers, media_type="application/problem+json")
