"""Content negotiation of pages: Accept, `?format=` and Accept-Encoding (RFC 9110, PEP 691)."""

from __future__ import annotations

from typing import Literal

Format = Literal["json", "html"]
Encoding = Literal["", "gzip", "zstd"]

JSON = "application/vnd.pypi.simple.v1+json"
HTML = "application/vnd.pypi.simple.v1+html"
PLAIN = "text/html"

_OFFERS: tuple[tuple[str, str], ...] = (
    # The order decides between equal qualities: a client without preference gets the format that every installer reads.
    (PLAIN, PLAIN),
    (JSON, JSON),
    ("application/vnd.pypi.simple.latest+json", JSON),
    (HTML, HTML),
    ("application/vnd.pypi.simple.latest+html", HTML),
)

CHARSET = "; charset=utf-8"


def content_type(accept: str | None, wanted: str | None = None) -> str | None:
    """The media type of the response, or None for 406. `wanted` is `?format=` and overrides the header."""
    if wanted is not None:
        return dict(_OFFERS).get(wanted)
    if not accept or not accept.strip():
        return PLAIN
    ranges = _parse(accept)
    best, concrete = max(_OFFERS, key=lambda offer: _quality(ranges, offer[0]))
    return concrete if _quality(ranges, best) > 0 else None


def accepts(accept: str | None, *offers: str) -> bool:
    """Whether the client accepts one of these media types. Without Accept, it accepts all."""
    if not accept or not accept.strip():
        return True
    ranges = _parse(accept)
    return any(_quality(ranges, offer) > 0 for offer in offers)


def format_of(media: str) -> Format:
    """The format of the bytes of a media type."""
    return "json" if media == JSON else "html"


def encoding(accept: str | None) -> Encoding:
    """The first of zstd, gzip and plain that the client accepts."""
    if not accept:
        return ""
    ranges = _parse(accept)
    offers: tuple[Encoding, ...] = ("zstd", "gzip")
    best = max(offers, key=lambda name: ranges.get(name, ranges.get("*", 0.0)))
    return best if ranges.get(best, ranges.get("*", 0.0)) > 0 else ""


def names_etag(match: str, etag: str) -> bool:
    """Whether If-None-Match names this ETag."""
    return match.strip() == "*" or etag in [item.strip().removeprefix("W/") for item in match.split(",")]


def _parse(header: str) -> dict[str, float]:
    """Media range (or coding) to quality; unreadable parts are ignored."""
    qualities: dict[str, float] = {}
    for item in header.split(","):
        name, *parameters = (part.strip() for part in item.split(";"))
        quality = 1.0
        for parameter in parameters:
            key, _, value = parameter.partition("=")
            if key.strip().lower() == "q":
                quality = _number(value.strip())
        if name:
            qualities[name.lower()] = quality
    return qualities


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return value if 0 <= value <= 1 else 0.0


def _quality(ranges: dict[str, float], offer: str) -> float:
    """The quality of the most specific matching range."""
    for name in (offer, offer.split("/")[0] + "/*", "*/*"):
        if name in ranges:
            return ranges[name]
    return 0.0
