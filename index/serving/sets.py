"""Staged sets over HTTP, for clients on other machines: create a set, list its missing wheels, publish it."""

from __future__ import annotations

import asyncio
import hashlib
import json
from functools import partial

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gracefarm.errors import UsageError
from index.errors import NotFoundError, RefusedError
from index.names import check_set_name, normalise
from index.serving.requests import body_of, identify
from index.serving.service import IndexService
from index.sets import pylock, staged
from index.sets.staged import ReleaseSet
from index.simple_api import negotiate, views
from index.store import auth
from index.store.auth import Token
from index.web.site import forwarded_prefix

MAX_MATRIX = 20_000
"Maximum lines. A set with third-party wheels has one line per wheel."


def routes(service: IndexService) -> list[Route]:
    """/stage/SET, …/publish and …/pylock.toml require a token for all projects; GET of pylock.toml is public."""
    return [
        Route("/stage/{set_name}", partial(state, service), methods=["GET", "PUT"]),
        Route("/stage/{set_name}/publish", partial(publish, service), methods=["POST"]),
        Route(f"/stage/{{set_name}}/{pylock.FILENAME}", partial(put_pylock, service), methods=["PUT"]),
        Route(f"/{{set_name}}/{pylock.FILENAME}", partial(get_pylock, service)),
        Route(f"/preview/{{token}}/{pylock.FILENAME}", partial(get_pylock, service)),
    ]


async def state(service: IndexService, request: Request) -> Response:
    """GET: the set's state. PUT: create it with a matrix; repeating the same matrix is allowed while the set is staged."""
    name, token = await _authorised(service, request)
    if request.method != "PUT":
        return _answer(service, request, _find(service, name))
    raw = await body_of(service, request)
    matrix, without = staged.parse_matrix(_texts(raw, "expect")), _texts(raw, "without", optional=True)
    opened = await asyncio.get_running_loop().run_in_executor(
        service.writer, _open, service, token.actor, name, matrix, without
    )
    return _answer(service, request, opened)


async def publish(service: IndexService, request: Request) -> Response:
    """POST: publish the whole set, or refuse and name the missing wheels."""
    name, token = await _authorised(service, request)
    _find(service, name)
    published = await asyncio.get_running_loop().run_in_executor(
        service.writer, staged.publish, service.store, service.catalogue, token.actor, name
    )
    service.page_cache.refresh(now=True)
    return _answer(service, request, published)


async def put_pylock(service: IndexService, request: Request) -> Response:
    """PUT: store the set's pylock.toml (PEP 751). It is served unchanged."""
    name, token = await _authorised(service, request)
    _find(service, name)
    raw = await body_of(service, request)
    await asyncio.get_running_loop().run_in_executor(
        service.writer, staged.put_pylock, service.catalogue, token.actor, name, raw
    )
    service.page_cache.refresh(now=True)
    return _answer(service, request, _find(service, name))


async def get_pylock(service: IndexService, request: Request) -> Response:
    """GET /SET/pylock.toml, /preview/TOKEN/pylock.toml."""
    prefix = request.url.path.strip("/").split("/")[:-1]
    view = views.find(service.catalogue, prefix)
    raw = staged.pylock_of(service.catalogue, view.argument) if view is not None and view.kind == "set" else None
    if raw is None:
        raise NotFoundError(
            f"this index has no {pylock.FILENAME} of {prefix[-1]!r}",
            remedy="open the page /sets/ of this index, which lists the sets and their files",
        )
    etag = f'"{hashlib.sha256(raw).hexdigest()}"'
    headers = {"ETag": etag, "Cache-Control": "no-cache"}
    match = request.headers.get("if-none-match")
    if match and negotiate.names_etag(match, etag):
        return Response(status_code=304, headers=headers)
    return Response(raw, media_type="application/toml", headers=headers)


async def _authorised(service: IndexService, request: Request) -> tuple[str, Token]:
    """The set's name, and a token that covers it."""
    name = check_set_name(request.path_params["set_name"])
    token = await identify(service, request)
    auth.allow(token, set_name=name)
    return name, token


def _find(service: IndexService, name: str) -> ReleaseSet:
    try:
        return staged.find(service.catalogue, name)
    except UsageError as error:
        raise NotFoundError(error.cause, remedy=f"create the set with PUT /stage/{name}") from error


def _open(service: IndexService, actor: str, name: str, matrix: list[staged.ExpectedWheel], without: list[str]) -> ReleaseSet:
    known = service.catalogue.row("SELECT state FROM release_set WHERE name = ?", (name,))
    if known is None:
        return staged.create(service.catalogue, actor, name, matrix, without=without)
    known_set = staged.find(service.catalogue, name)
    same = known_set.matrix == tuple(matrix) and known_set.without == tuple(sorted({normalise(text) for text in without}))
    if known_set.state == "dropped" or not same:
        raise RefusedError(
            f"a set {name!r} already exists; it is {known_set.state} and has a different matrix"
            if known_set.state != "dropped"
            else f"a set {name!r} existed and was dropped; names of sets cannot be reused",
            remedy="choose a different name",
        )
    return known_set


def _texts(raw: bytes, key: str, *, optional: bool = False) -> list[str]:
    """A list of strings in the body; empty if it is `optional` and absent."""
    try:
        body = json.loads(raw)
        lines = body.get(key, []) if optional else body[key]
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        lines = None
    if not isinstance(lines, list) or len(lines) > MAX_MATRIX or not all(isinstance(line, str) for line in lines):
        raise RefusedError(
            "the set's matrix is not valid",
            remedy='send {"expect": ["causal-conv1d==1.7.0 cp311 aarch64", …], "without": ["NAME", …]}',
        )
    return lines


def _answer(service: IndexService, request: Request, shown: ReleaseSet) -> Response:
    prefix = forwarded_prefix(request, service.options.trusted_proxies)
    value = {
        "name": shown.name,
        "state": shown.state,
        "expect": [str(wheel) for wheel in shown.matrix],
        "files": dict(zip(shown.files, shown.digests, strict=True)),
        "missing": list(shown.missing),
        "upload": f"{prefix}/stage/{shown.name}/legacy/" if shown.state == "staged" else None,
        "preview": f"{prefix}/preview/{shown.preview}/simple/" if shown.state == "staged" else None,
        "simple": f"{prefix}/{shown.name}/simple/" if shown.state == "published" else None,
        "pylock": shown.pylock,
        "without": list(shown.without),
    }
    return JSONResponse(value, headers={"Cache-Control": "no-store"})
