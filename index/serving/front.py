"""The first handler of every request: it answers /simple/ from rendered pages, passes the rest to Starlette and logs all."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from functools import lru_cache
from typing import TypeVar
from urllib.parse import parse_qs, quote, unquote

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from index.errors import RefusalError, sentence
from index.names import normalise
from index.serving.accesslog import AccessLog
from index.serving.draining import Body, drain
from index.serving.proxies import client_address
from index.serving.service import IndexService
from index.simple_api import negotiate, views
from index.simple_api.negotiate import Encoding
from index.web.site import forwarded_prefix

T = TypeVar("T")

_MOST_ANSWERS = 8192
"Cached responses: one per page, media type and coding. Other headers of a client add no entry."

_HEADERS = 256
"Values of Accept and Accept-Encoding to remember with their parsed form. Installers send a dozen different ones."

_LONGEST = 512
"Maximum characters of a header to remember."

_LOG = logging.getLogger("index")

_SAFE = re.compile(r"[A-Za-z0-9/+%~:@!$&'()*,;=._-]+")

_PAGE = re.compile(r"/simple(/[^/]*){0,2}\Z")

_COMMON = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]


class PageAnswer:
    """A complete response to a GET or HEAD of a page."""

    __slots__ = ("body", "etag", "head", "size", "start", "status", "unchanged")

    def __init__(
        self, status: int, headers: list[tuple[bytes, bytes]], body: bytes, etag: str = "", unchanged: PageAnswer | None = None
    ) -> None:
        self.status = status
        self.etag = etag
        self.unchanged = unchanged
        self.start: Message = {"type": "http.response.start", "status": status, "headers": [*headers, *_COMMON]}
        self.body: Message = {"type": "http.response.body", "body": body}
        self.head: Message = {"type": "http.response.body", "body": b""}
        self.size = len(body)

    def unless(self, match: str) -> PageAnswer:
        """This response, or a 304 if If-None-Match names its ETag."""
        if self.unchanged is None:
            return self
        return self.unchanged if negotiate.names_etag(match, self.etag) else self


class Front:
    """The ASGI application that granian runs. routes.py answers all other requests."""

    def __init__(self, service: IndexService, rest: Starlette) -> None:
        self.service = service
        self.rest = rest
        self.log = AccessLog(service.options.access_log)
        self._answers: dict[tuple[str, str, Encoding], PageAnswer] = {}
        self._media = _remembering(negotiate.content_type)
        self._coding = _remembering(negotiate.encoding)
        self._views: tuple[str, ...] = ()
        self._generation = -1

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.rest(scope, receive, send)
            return
        started = time.perf_counter()
        path: str = scope["path"]
        method: str = scope["method"]
        # Pages for installers end in /simple/ or /simple/NAME/; a missing slash is redirected below.
        if "/simple" in path and (answer := self._simple(scope, method, path)) is not None:
            if method == "POST":
                await drain(Body(receive), self.service.limits.idle)
            await send(answer.start)
            await send(answer.head if method == "HEAD" else answer.body)
            self._account(scope, answer.status, 0 if method == "HEAD" else answer.size, started)
            return
        await self._through(scope, receive, send, started)

    async def _through(self, scope: Scope, receive: Receive, send: Send, started: float) -> None:
        status, size = 500, 0

        async def counted(message: Message) -> None:
            nonlocal status, size
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *_COMMON]
            elif message["type"] == "http.response.body":
                size += len(message.get("body", b""))
            await send(message)

        try:
            await self.rest(scope, receive, counted)
        except Exception:  # noqa: BLE001 - the last place that can tell
            # Starlette has sent the 500 and raises the exception again. It is our defect, so print it for the operator.
            _LOG.exception("%s %r failed", scope["method"], scope["path"])
        finally:
            self._account(scope, status, 0 if scope["method"] == "HEAD" else size, started)

    def _account(self, scope: Scope, status: int, size: int, started: float) -> None:
        self.service.metrics.request(scope["method"], status, size)
        if not self.log.enabled:
            return
        agent, span, _ = _pick(scope["headers"], (b"user-agent", b"range", b""))
        client = client_address(scope, self.service.options.trusted_proxies)
        path, query = scope["path"], scope["query_string"]
        target = path if _SAFE.fullmatch(path) else quote(path, safe="/+%~:@!$&'()*,;=-._")
        if query:
            target += "?" + query.decode("latin-1")
        self.log.write(client, scope["method"], target, status, size, agent or "-", span or "-", time.perf_counter() - started)

    def _simple(self, scope: Scope, method: str, path: str) -> PageAnswer | None:
        if method not in ("GET", "HEAD"):
            return self._no_method(scope) if _PAGE.search(path) else None
        generation = self.service.page_cache.refresh()
        if generation != self._generation or len(self._answers) > _MOST_ANSWERS:
            self._answers.clear()
            self._views = ()
            self._generation = generation
        accept, coding, match = _pick(scope["headers"], (b"accept", b"accept-encoding", b"if-none-match"))
        query: bytes = scope["query_string"]
        media = self._media(accept) if not query else _media_of(query, accept)
        encoding = self._coding(coding)
        if media is None:
            answer = self._make(scope, media, encoding)
        elif (answer := self._answers.get((path, media, encoding))) is None:
            answer = self._make(scope, media, encoding)
            # Another spelling of the path, or a query, would add another entry for the same page.
            if answer is not None and answer.status == 200 and not query and "%" not in path:
                self._answers[path, media, encoding] = answer
        return answer.unless(match) if match and answer is not None else answer

    def _make(self, scope: Scope, media: str | None, encoding: Encoding) -> PageAnswer | None:
        """The response for a page; None if the path does not belong to the simple API."""
        path, query = scope["path"], scope["query_string"]
        parts = unquote(path).split("/")[1:] if "%" in path else path.split("/")[1:]
        try:
            at = parts.index("simple")
        except ValueError:
            return None
        view = views.find(self.service.catalogue, parts[:at])
        if view is None or len(parts) - at > 3 or (len(parts) - at == 3 and parts[-1]):
            return self._no_view(scope)
        name = parts[at + 1] if len(parts) - at > 1 else ""
        try:
            if (away := _redirect(parts, at, name)) is not None:
                return _moved(away + ("?" + query.decode("latin-1") if query else ""))
            return self._page(view, name, media, encoding)
        except RefusalError as error:
            return _plain(404, sentence(error, self._prefix(scope)) + "\n")

    def _no_view(self, scope: Scope) -> PageAnswer:
        """404 with a list of the views."""
        self._views = self._views or tuple(view.address for view in views.public(self.service.catalogue))
        prefix = self._prefix(scope)
        existing = ", ".join(prefix + address for address in self._views)
        return _plain(404, f"this view does not exist (existing views: {existing})\n")

    def _no_method(self, scope: Scope) -> PageAnswer:
        """405 with the address for uploads."""
        return _plain(405, _NO_METHOD.format(prefix=self._prefix(scope)), (b"allow", b"GET, HEAD"))

    def _prefix(self, scope: Scope) -> str:
        return forwarded_prefix(Request(scope), self.service.options.trusted_proxies)

    def _page(self, view: views.View, name: str, media: str | None, encoding: Encoding) -> PageAnswer:
        if media is None:
            return _plain(406, f"this page is available as {negotiate.JSON}, {negotiate.HTML} and text/html\n")
        page = self.service.page_cache.page(view, name, negotiate.format_of(media))
        etag = page.etag(encoding)
        headers = [
            (b"etag", etag.encode()),
            (b"vary", b"Accept, Accept-Encoding"),
            (
                b"cache-control",
                # uv caches pages as long as the headers allow, which would delay new releases (astral-sh/uv#14680).
                b"no-cache" if view.prefix[:1] != ("preview",) else b"private, no-cache",
            ),
        ]
        unchanged = PageAnswer(304, list(headers), b"")
        body = page.body(encoding)
        if used := page.coding(encoding):
            headers.append((b"content-encoding", used.encode()))
        headers.append((b"content-type", (media + (negotiate.CHARSET if media == negotiate.PLAIN else "")).encode()))
        headers.append((b"content-length", str(len(body)).encode()))
        return PageAnswer(200, headers, body, etag, unchanged)


def _media_of(query: bytes, accept: str | None) -> str | None:
    # Media types contain plus signs and no spaces, so a bare plus is not an encoded space.
    wanted = parse_qs(query.decode("latin-1").replace("+", "%2B")).get("format", [None])[-1]
    return negotiate.content_type(accept, wanted)


def _remembering(read: Callable[[str | None], T]) -> Callable[[str | None], T]:
    """Wrap `read`, which parses a header, in a cache of earlier values."""
    remembered = lru_cache(_HEADERS)(read)
    return lambda header: remembered(header) if header is None or len(header) <= _LONGEST else read(header)


def _redirect(parts: list[str], at: int, name: str) -> str | None:
    """The canonical address of the page, relative to the requested one; None if this is the canonical one."""
    slash = parts[-1] == ""
    if not name:
        return None if slash and len(parts) - at == 2 else "simple/"
    right = normalise(name)
    if right == name and slash:
        return None
    return f"../{right}/" if slash else f"{right}/"


def _moved(location: str) -> PageAnswer:
    headers = [(b"location", location.encode()), (b"content-length", b"0"), (b"cache-control", b"max-age=3600, public")]
    return PageAnswer(301, headers, b"")


def _plain(status: int, text: str, *more: tuple[bytes, bytes]) -> PageAnswer:
    body = text.encode()
    headers = [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", str(len(body)).encode()),
        (b"vary", b"Accept, Accept-Encoding"),
        (b"cache-control", b"no-cache"),
        *more,
    ]
    return PageAnswer(status, headers, body)


_NO_METHOD = (
    "this address is for installers; upload to {prefix}/legacy/ (twine upload --repository-url …/legacy/, uv publish"
    " --publish-url …/legacy/; GET {prefix}/legacy/ shows the commands)\n"
)


def _pick(headers: list[tuple[bytes, bytes]], wanted: tuple[bytes, bytes, bytes]) -> list[str | None]:
    """Three headers in one pass; repeated headers are joined (RFC 9110)."""
    values: list[str | None] = [None, None, None]
    for name, value in headers:
        if name in wanted:
            place = wanted.index(name)
            text = value.decode("latin-1")
            before = values[place]
            values[place] = text if before is None else f"{before}, {text}"
    return values
