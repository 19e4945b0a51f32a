"""A description on stdin, rendered as safe HTML to stdout: `about` runs this file as a process with limits.

A short description can take hours or all memory: substitutions of reStructuredText double at each level, and deeply nested
HTML costs the square of its depth. A thread cannot be ended and holds up the others, a process can be ended. The process
starts for each description, so this file imports what it needs alone, and nothing of `index`.
"""

from __future__ import annotations

import html
import re
import resource
import sys

MARKDOWN, RST = KINDS = ("text/markdown", "text/x-rst")
"The kinds of description that are rendered."

SECONDS = 5
"Of processor time; a README of 60 KB takes less than one."

MEMORY = 512 << 20
"Bytes of address space."

MAX_HTML = 2 << 20
"Characters of HTML."

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


def main() -> int:
    """Render stdin; the exit status is 1 for what cannot be rendered, and a signal's at a limit."""
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
    """By the library that PyPI renders with; None for what cannot be rendered."""
    if kind == MARKDOWN:
        from readme_renderer import markdown

        return markdown.render(text)
    from readme_renderer import rst

    return rst.render(text)


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


if __name__ == "__main__":
    sys.exit(main())
