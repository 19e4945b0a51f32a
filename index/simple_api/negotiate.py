"""Which form of a page a client wants: Accept, `?format=` and Accept-Encoding (RFC 9110, PEP 691)."""

from __future__ import annotations

from typing import Literal

Format = Literal["json", "html"]
Encoding = Literal["", "gzip", "zstd"]

JSON = "application/vnd.pypi.simple.v1+json"
HTML = "application/vnd.pypi.simple.v1+html"
PLAIN = "text/html"

_OFFERS: tuple[tuple[str, str], ...] = (
    # Order decides between equals: what says nothing gets what every installer since 2013 reads.
    (PLAIN, PLAIN),
    (JSON, JSON),
    ("application/vnd.pypi.simple.latest+json", JSON),
    (HTML, HTML),
    ("application/vnd.pypi.simple.latest+html", HTML),
)

CHARSET = "; charset=utf-8"


def content_type(accept: str | None, wanted: str | None = None) -> str | None:
    """The media type to answer with, or None for 406. `wanted` is `?format=` and beats the header."""
    if wanted is not None:
        return dict(_OFFERS).get(wanted)
    if not accept or not accept.strip():
        return PLAIN
    ranges = _parse(accept)
    best, concrete = max(_OFFERS, key=lambda offer: _quality(ranges, offer[0]))
    return concrete if _quality(ranges, best) > 0 else None


def accepts(accept: str | None, *offers: str) -> bool:
    """Does the client take one of these media types? What sends no Accept takes everything."""
    if not accept or not accept.strip():
        return True
    ranges = _parse(accept)
    return any(_quality(ranges, offer) > 0 for offer in offers)


def format_of(media: str) -> Format:
    """The bytes behind a media type."""
    return "json" if media == JSON else "html"


def encoding(accept: str | None) -> Encoding:
    """zstd before gzip before plain, as far as the client takes them."""
    if not accept:
        return ""
    ranges = _parse(accept)
    offers: tuple[Encoding, ...] = ("zstd", "gzip")
    best = max(offers, key=lambda name: ranges.get(name, ranges.get("*", 0.0)))
    return best if ranges.get(best, ranges.get("*", 0.0)) > 0 else ""


def names_etag(match: str, etag: str) -> bool:
    """Does If-None-Match name this ETag?"""
    return match.strip() == "*" or etag in [item.strip().removeprefix("W/") for item in match.split(",")]


def _parse(header: str) -> dict[str, float]:
    """Media range (or coding) to quality; what cannot be read counts as not sent."""
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
    """The most specific range that matches decides."""
    for name in (offer, offer.split("/")[0] + "/*", "*/*"):
        if name in ranges:
            return ranges[name]
    return 0.0
