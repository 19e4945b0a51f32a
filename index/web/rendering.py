"""Render a description from stdin as safe HTML on stdout. `about` runs this file as a process with limits.

A short description can take hours or all memory: substitutions of reStructuredText double at each level, and the cost of
deeply nested HTML is quadratic. A thread cannot be stopped and delays the others; a process can be stopped. A process starts
for each description, so this file imports only what it needs, and nothing of `index`.
"""

from __future__ import annotations

import html
import re
import resource
import sys

MARKDOWN, RST = KINDS = ("text/markdown", "text/x-rst")
"Content types that can be rendered."

SECONDS = 5
"Limit of processor time in seconds. A README of 60 KB takes less than one."

MEMORY = 512 << 20
"Limit of the address space in bytes."

MAX_HTML = 2 << 20
"Maximum characters of HTML."

TAGS = frozenset(
    (
        *("a", "b", "blockquote", "br", "code", "dd", "del", "details", "div", "dl", "dt", "em", "h1", "h2", "h3", "h4", "h5"),
        *("h6", "hr", "i", "kbd", "li", "ol", "p", "pre", "s", "samp", "span", "strong", "sub", "summary", "sup", "table"),
        *("tbody", "td", "th", "thead", "tr", "tt", "ul", "var"),
    )
)
"Allowed HTML elements. Images are not allowed, since pages load nothing from other hosts."

_IMAGE = re.compile(r"""<img(?:\s+[^\s=>]+(?:="[^"]*")?)*\s*/?>""")
_ALT = re.compile(r'\salt="([^"]*)"')
_HEADING = re.compile(r"<(/?)h([1-6])>")
_PRE = re.compile(r"<pre\b[^>]*>")
_EMPTY = re.compile(r"<(a|p|h[1-6])(?:\s[^>]*)?>\s*</\1>")


def main() -> int:
    """Render stdin. The exit status is 1 if rendering fails, and that of a signal at a limit."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    rendered = _rendered(sys.stdin.buffer.read().decode(), sys.argv[1])
    safe = _safe(rendered) if rendered is not None and len(rendered) <= MAX_HTML else None
    if safe is None or len(safe) > MAX_HTML:
        return 1
    sys.stdout.buffer.write(safe.encode())
    return 0


def _rendered(text: str, kind: str) -> str | None:
    """Render with the library that PyPI uses; None if rendering fails."""
    if kind == MARKDOWN:
        from readme_renderer import markdown

        return markdown.render(text)
    from readme_renderer import rst

    return rst.render(text)


def _safe(rendered: str) -> str:
    """Reduce HTML to `TAGS` and external links, replace images with their text, and lower headings below those of the page."""
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
    scrolling = _PRE.sub('<pre tabindex="0">', _headings(cleaned))  # scrollable parts must be reachable by keyboard
    return scrolling.replace("<table>", '<div class="scroll" tabindex="0"><table>').replace("</table>", "</table></div>")


def _picture(match: re.Match[str]) -> str:
    alternative = _ALT.search(match[0])
    return html.escape(html.unescape(alternative[1])) if alternative else ""


def _headings(text: str) -> str:
    """Lower headings to h3 and below; each is at most one level below the previous one."""
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


if __name__ == "__main__":
    sys.exit(main())
