"""A sweep as one SVG that needs nothing else: three panels over the number of requests at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from deploy.measure.bench import Report

WIDTH, HEIGHT = 960, 350
PANEL, LEFT, TOP, BOTTOM, GAP = 250, 54, 100, 48, 60
STYLE = """
text{font:12px system-ui,sans-serif;fill:#374151}.title{font-size:15px;font-weight:600;fill:#111827}.head{font-weight:600}
.small{font-size:11px}.grid{stroke:#e5e7eb}.a{stroke:#2563eb;fill:#2563eb}.b{stroke:#d97706;fill:#d97706}
.line{fill:none;stroke-width:2}.dash{stroke-dasharray:5 4}.back{fill:#fff}
@media(prefers-color-scheme:dark){.back{fill:#111827}text{fill:#d1d5db}.title{fill:#f9fafb}.grid{stroke:#374151}
.a{stroke:#60a5fa;fill:#60a5fa}.b{stroke:#fbbf24;fill:#fbbf24}}
"""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A value for each level; None is left out."""

    label: str
    values: Sequence[float | None]
    css: str
    dashed: bool = False


def svg(report: Report) -> str:
    """The picture. Labels are text, so that it can be searched and read aloud."""
    levels = report.levels
    panels = [
        (
            "tokens/s, all streams",
            Line(label="measured", values=[one.tokens_per_s for one in levels], css="a"),
            Line(label="predicted, at best", values=[one.predicted_tokens_per_s for one in levels], css="b", dashed=True),
        ),
        (
            "ms until the first text",
            Line(label="p50", values=[one.first_ms.p50 if one.first_ms else None for one in levels], css="a"),
            Line(label="p99", values=[one.first_ms.p99 if one.first_ms else None for one in levels], css="b"),
        ),
        (
            "ms between tokens",
            Line(label="p50", values=[one.token_ms.p50 if one.token_ms else None for one in levels], css="a"),
            Line(label="p99", values=[one.token_ms.p99 if one.token_ms else None for one in levels], css="b"),
        ),
    ]
    names = [str(one.concurrency) for one in levels]
    title = f"{report.model}{', ' + report.layout if report.layout else ''}"
    below = f"about {report.prompt_tokens} tokens in, {'' if report.to_the_end else 'at most '}{report.max_tokens} out"
    body = [
        _panel(LEFT + index * (PANEL + GAP), head, names, [one for one in lines if any(one.values)])
        for index, (head, *lines) in enumerate(panels)
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
        f"<title>{escape(title)}: speed over requests at once</title><style>{STYLE}</style>"
        f'<rect class="back" width="{WIDTH}" height="{HEIGHT}"/>'
        f'<text class="title" x="{LEFT - 40}" y="24">{escape(title)}</text>'
        f'<text class="small" x="{LEFT - 40}" y="42">{escape(below)}</text>{"".join(body)}</svg>\n'
    )


def _panel(left: float, head: str, names: Sequence[str], lines: Sequence[Line]) -> str:
    top, bottom = TOP, HEIGHT - BOTTOM
    highest = ceiling(max((value for line in lines for value in line.values if value), default=1.0))
    parts = [f'<text class="head" x="{left}" y="{top - 32}">{escape(head)}</text>']
    for step in range(5):
        y = bottom - (bottom - top) * step / 4
        parts.append(f'<path class="grid" d="M{left} {y:.1f}h{PANEL}"/>')
        parts.append(f'<text class="small" text-anchor="end" x="{left - 6}" y="{y + 4:.1f}">{highest * step / 4:g}</text>')
    places = [left + PANEL * (index + 0.5) / len(names) for index in range(len(names))]
    for place, name in zip(places, names, strict=True):
        parts.append(f'<text class="small" text-anchor="middle" x="{place:.1f}" y="{bottom + 16}">{escape(name)}</text>')
    parts.append(f'<text class="small" text-anchor="middle" x="{left + PANEL / 2}" y="{bottom + 34}">requests at once</text>')
    for index, line in enumerate(lines):
        at = [
            (place, bottom - (bottom - top) * value / highest)
            for place, value in zip(places, line.values, strict=True)
            if value is not None
        ]
        dash = " dash" if line.dashed else ""
        parts.append(f'<path class="line {line.css}{dash}" d="M{" L".join(f"{x:.1f} {y:.1f}" for x, y in at)}"/>')
        parts += [f'<circle class="{line.css}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in at]
        x, y = left + 110 * index, top - 12
        parts.append(f'<path class="line {line.css}{dash}" d="M{x} {y - 4}h18"/>')
        parts.append(f'<text class="small" x="{x + 24}" y="{y}">{escape(line.label)}</text>')
    return "".join(parts)


def ceiling(value: float) -> float:
    """The next 1, 2, 4 or 8 times a power of ten: quarters of it are round."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 4, 8, 10) if step * power >= value * 0.999)
