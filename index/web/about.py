"""What a distribution's METADATA tells people: description, dependencies, links, licence."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

from packaging.metadata import RawMetadata, parse_email
from packaging.requirements import InvalidRequirement, Requirement

from index.store.files import Store

MAX_DESCRIPTION = 256 << 10
"Characters of a description that are rendered; a longer one is shown as text, cut there."

TAGS = frozenset(
    (
        *("a", "b", "blockquote", "br", "code", "dd", "del", "details", "div", "dl", "dt", "em", "h1", "h2", "h3", "h4", "h5"),
        *("h6", "hr", "i", "kbd", "li", "ol", "p", "pre", "s", "samp", "span", "strong", "sub", "summary", "sup", "table"),
        *("tbody", "td", "th", "thead", "tr", "tt", "ul", "var"),
    )
)
"What may stand in a description. No images: pages load nothing from elsewhere."

_IMAGE = re.compile(r"""<img(?:\s+[^\s=>]+(?:="[^"]*")?)*\s*/?>""")
_ALT = re.compile(r'\salt="([^"]*)"')
_HEADING = re.compile(r"<(/?)h([1-6])>")
_PRE = re.compile(r"<pre\b[^>]*>")
_EMPTY = re.compile(r"<(a|p|h[1-6])(?:\s[^>]*)?>\s*</\1>")


@dataclass(frozen=True, kw_only=True)
class Dependencies:
    """Requirements under one condition."""

    extra: str
    "Of this extra; empty: always."
    requirements: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class About:
    """What the page of a project says beside its files. Each part is empty where METADATA has none."""

    summary: str = ""
    description: str = ""
    "HTML, or empty."
    license: str = ""
    author: str = ""
    requires_python: str = ""
    dependencies: tuple[Dependencies, ...] = ()
    links: tuple[tuple[str, str], ...] = ()
    "Label and address."


def read(store: Store, metadata_sha256: str | None) -> About:
    """What the stored METADATA of that digest says; nothing where there is none."""
    with suppress(OSError):
        if metadata_sha256 is not None:
            return about(store.path(metadata_sha256).read_bytes())
    return About()


def about(raw: bytes) -> About:
    """What this METADATA says. What cannot be read is left out."""
    fields, unparsed = parse_email(raw)
    description = fields.get("description") or _text(unparsed.get("description", []))
    return About(
        summary=" ".join((fields.get("summary") or "").split()),
        description=render(description, fields.get("description_content_type") or ""),
        license=_license(fields),
        author=fields.get("author") or fields.get("author_email") or fields.get("maintainer") or "",
        requires_python=fields.get("requires_python") or "",
        dependencies=_dependencies(fields.get("requires_dist", [])),
        links=tuple(_links(fields)),
    )


def _text(values: Sequence[str | bytes]) -> str:
    """A field that is not what it should be, such as a description in latin-1."""
    return "\n".join(value.decode("utf-8", "replace") if isinstance(value, bytes) else value for value in values)


def _license(fields: RawMetadata) -> str:
    """The expression, or a short text; a whole licence in that field is no name."""
    text = fields.get("license_expression") or fields.get("license") or ""
    if text and "\n" not in text and len(text) <= 200:
        return text
    named = [line.rpartition(" :: ")[2] for line in fields.get("classifiers", []) if line.startswith("License :: ")]
    return ", ".join(named)


def _dependencies(lines: list[str]) -> tuple[Dependencies, ...]:
    """Grouped by the extra that asks for them, in the order of METADATA."""
    groups: dict[str, list[str]] = {"": []}
    for line in lines:
        extra, text = _requirement(line)
        groups.setdefault(extra, []).append(text)
    return tuple(Dependencies(extra=extra, requirements=tuple(texts)) for extra, texts in groups.items() if texts)


def _requirement(line: str) -> tuple[str, str]:
    """The extra that asks for it, and the requirement without that condition."""
    try:
        requirement = Requirement(line)
    except InvalidRequirement:
        return "", line
    marker = str(requirement.marker or "")
    match = re.search(r'(?:^| and )extra == "([^"]*)"\Z', marker)
    if match is None:
        return "", str(requirement)
    plain = str(Requirement(line.partition(";")[0])) if ";" in line else str(requirement)
    condition = marker[: match.start()].removeprefix("(").removesuffix(")") if match.start() else ""
    return match[1], f"{plain}; {condition}" if condition else plain


def _links(fields: RawMetadata) -> list[tuple[str, str]]:
    """Project-URL and Home-page, as far as they are addresses of the web."""
    links: Mapping[str, str] = fields.get("project_urls", {})
    home = fields.get("home_page")
    named = [*([("Homepage", home)] if home else []), *links.items()]
    known: dict[str, str] = {}
    for label, address in named:
        if _is_web(address):
            known.setdefault(address, label or address)
    return [(label, address) for address, label in known.items()]


def _is_web(address: str) -> bool:
    try:
        parts = urlsplit(address)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.netloc)


def render(text: str, content_type: str) -> str:
    """A description as HTML that holds nothing but text, tables and links to other places."""
    kind = content_type.partition(";")[0].strip().lower()
    if not text.strip() or text.strip() == "UNKNOWN":
        return ""
    rendered = _rendered(text, kind) if len(text) <= MAX_DESCRIPTION else None
    if rendered is None:
        return f'<pre tabindex="0">{html.escape(text[:MAX_DESCRIPTION])}</pre>'
    return _safe(rendered)


def _rendered(text: str, kind: str) -> str | None:
    """By the library that PyPI renders with; None for plain text, and for what cannot be rendered."""
    if kind == "text/markdown":
        from readme_renderer import markdown

        return markdown.render(text)
    if kind in ("", "text/x-rst"):
        from readme_renderer import rst

        return rst.render(text)
    return None


def _safe(rendered: str) -> str:
    """Only `TAGS`, links that lead to other places, pictures as their text, and headings that fit below those of the page."""
    import nh3

    text = _IMAGE.sub(_picture, rendered)
    cleaned = nh3.clean(
        text,
        tags=set(TAGS),
        attributes={"a": {"href"}, "td": {"colspan", "rowspan"}, "th": {"colspan", "rowspan"}},
        url_schemes={"http", "https", "mailto"},
        link_rel="nofollow noopener noreferrer",
        url_relative="deny",
    )
    while (shorter := _EMPTY.sub("", cleaned)) != cleaned:
        cleaned = shorter
    scrolling = _PRE.sub('<pre tabindex="0">', _headings(cleaned))  # a keyboard must reach what scrolls
    return scrolling.replace("<table>", '<div class="scroll" tabindex="0"><table>').replace("</table>", "</table></div>")


def _picture(match: re.Match[str]) -> str:
    alternative = _ALT.search(match[0])
    return html.escape(html.unescape(alternative[1])) if alternative else ""


def _headings(text: str) -> str:
    """Headings from h3 on, none more than one level below the heading before it."""
    levels: dict[int, int] = {}
    last = 2

    def level(match: re.Match[str]) -> str:
        nonlocal last
        number = int(match[2])
        if not match[1]:
            above = [levels[known] for known in sorted(levels) if known < number]
            for known in [known for known in levels if known >= number]:
                del levels[known]
            last = levels[number] = min(6, (above[-1] if above else 2) + 1)
        return f"<{match[1]}h{last}>"

    return _HEADING.sub(level, text)
