"""URLs without credentials for messages; clients get credentials separately."""

from __future__ import annotations

import re
from urllib.parse import quote, unquote, urlsplit, urlunsplit

_USERINFO = re.compile(r"(?<=://)[^/\s'\"@]*(?:@[^/\s'\"@]*)*@")
_QUERY = re.compile(r"(https?://[^\s'\"?#]*)\?[^\s'\"]*")


def shown(text: str) -> str:
    """`text` without the user names, passwords and query strings (which carry signatures) of the URLs in it."""
    return _QUERY.sub(r"\1?...", _USERINFO.sub("", text))


def split_credentials(url: str) -> tuple[str, tuple[str, str] | None]:
    """The URL without `user:password@`, and user and password, decoded; in ssh URLs the user stays."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or parts.username is None:
        return url, None
    host = parts.netloc.rpartition("@")[2]
    bare = urlunsplit(parts._replace(netloc=host))
    return bare, (unquote(parts.username), unquote(parts.password or ""))


def same_host(url: str, other: str) -> bool:
    """Whether credentials for `url` may be sent to `other`: scheme, host and port are equal."""
    first, second = urlsplit(url), urlsplit(other)
    return (first.scheme, first.hostname, first.port) == (second.scheme, second.hostname, second.port)


def with_credentials(url: str, credentials: tuple[str, str] | None) -> str:
    """`url` with `user:password@`, for a function that takes one string; it is split again before use."""
    if credentials is None or "@" in urlsplit(url).netloc:
        return url
    user, password = (quote(part, safe="") for part in credentials)
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=f"{user}:{password}@{parts.netloc}"))
