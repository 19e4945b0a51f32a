"""Common parts of all web pages: the store, the templates, the address that pages print."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Container
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from packaging.version import Version
from starlette.requests import Request
from starlette.responses import Response

from index.errors import NotFoundError
from index.store.catalogue import Catalogue
from index.store.files import Store

if TYPE_CHECKING:
    from jinja2 import Environment

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; form-action 'self'; base-uri 'none'"
    "; frame-ancestors 'none'"
)

_PREFIX = re.compile(r"(/(?!\.{1,2}(/|\Z))[A-Za-z0-9._~-]+)*\Z")
"Form of X-Forwarded-Prefix: the path below which a proxy serves the index. The proxy removes it from requests."

_HOST = re.compile(r"[A-Za-z0-9.:\[\]-]{1,255}\Z")


@dataclass(frozen=True, kw_only=True)
class Site:
    """The web pages of one index."""

    store: Store
    catalogue: Catalogue
    base_url: str | None = None
    "Address that pages print; None: the address of the request."
    static: bool = False
    "True for an export: pages have no forms, which require a running server."
    trusted_proxies: Container[str] = ()
    "Proxies whose X-Forwarded-* headers are trusted."

    @cached_property
    def templates(self) -> Environment:
        """The template environment, created for the first page, so that an index for installers starts without it."""
        from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

        environment = Environment(
            loader=PackageLoader("index.web", "templates"),
            autoescape=select_autoescape(default=True),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            auto_reload=False,  # after an upgrade, a running server must not load templates of another version
        )
        environment.filters.update(
            size=size, duration=duration, cpu=cpu, public=public, local=local, day=lambda text: text[:10]
        )
        return environment

    def render(self, request: Request, template: str, *, status: int = 200, **values: Any) -> Response:
        """Render a page from a template."""
        # Relative addresses work under any mount point: `up` leads from this page to the first one.
        depth = request.url.path.rstrip("/").count("/") if request.url.path != "/" else 0
        up = "../" * depth if request.url.path.endswith("/") else "../" * (depth - 1)
        base = self.base(request)
        text = self.templates.get_template(template).render(
            up=up or "./", base=base, trusted=_trusted(base), static=self.static, **values
        )
        return self.answer(text.encode("utf-8", "replace"), "text/html; charset=utf-8", status=status)

    @staticmethod
    def answer(body: bytes, media: str, *, status: int = 200) -> Response:
        """A response with these bytes that clients must revalidate by ETag."""
        etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
        headers = {"ETag": etag, "Cache-Control": "no-cache", "Content-Security-Policy": POLICY}
        return Response(body, status_code=status, media_type=media, headers=headers)

    def missing(self, request: Request, error: NotFoundError) -> Response:
        """A page for a missing address, with links to the existing pages."""
        return self.render(request, "missing.html", status=404, cause=error.cause[:1].upper() + error.cause[1:])

    def base(self, request: Request) -> str:
        """The address of the index for users to copy."""
        if self.base_url:
            return self.base_url.rstrip("/")
        scheme, host = request.url.scheme, request.headers.get("host", "")
        if request.client and request.client.host in self.trusted_proxies:
            scheme = _first(request, "x-forwarded-proto") or scheme
            host = _first(request, "x-forwarded-host") or host
        prefix = forwarded_prefix(request, self.trusted_proxies)
        return f"{'https' if scheme == 'https' else 'http'}://{host if _HOST.match(host) else 'HOST'}{prefix}"


def forwarded_prefix(request: Request, trusted: Container[str]) -> str:
    """The path below which a trusted proxy serves the index; "" for the root of the host."""
    if request.client is None or request.client.host not in trusted:
        return ""
    prefix = _first(request, "x-forwarded-prefix").rstrip("/")
    return prefix if _PREFIX.match(prefix) else ""


def _first(request: Request, header: str) -> str:
    """The value from the proxy nearest to the client, to which further proxies append; "" if there is none."""
    return request.headers.get(header, "").split(",")[0].strip()


def _trusted(base: str) -> str:
    """The option that pip requires for plain http from another machine; "" if it is not required."""
    try:
        host = urlsplit(base).hostname or ""
    except ValueError:  # a Host header with an unmatched bracket
        return ""
    if base.startswith("https:") or host == "localhost" or host.startswith("127.") or host == "::1":
        return ""
    return f" --trusted-host {host}"


def size(count: int) -> str:
    """Format bytes in KiB, MiB or GiB."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB" if value < 100 else f"{value:,.0f} GiB"


def duration(seconds: float | None) -> str:
    """Format seconds."""
    if seconds is None or not math.isfinite(seconds):
        return ""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


def cpu(seconds: float) -> str:
    """Format CPU time in hours."""
    return f"{seconds / 3600:,.0f} h" if seconds >= 36000 else duration(seconds)


def public(version: str) -> str:
    """The public part of a version: 1.7.0 of 1.7.0+cu130."""
    return Version(version).public


def local(version: str, otherwise: str) -> str:
    """The local part of a version, which distinguishes builds of a release: cu130.torch2.11; else `otherwise`."""
    return Version(version).local or otherwise
