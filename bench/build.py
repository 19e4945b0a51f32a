"""A whole `builder build causal_conv1d` from warm caches: what it costs beside its compilers. About ten minutes."""

from __future__ import annotations

from bench.builder import Bed, builder, make_bed, timed
from builder import record
from gracefarm.files import remove_tree


def union(intervals: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, end = 0.0, 0.0
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def whole_build(bed: Bed) -> tuple[float, float]:
    """Wall seconds of `builder build causal_conv1d` with warm caches, and those in which a compiler ran, by ninja's log."""
    remove_tree(record.folder(bed.settings, bed.plan.build_id))
    wall = timed(lambda: builder("build", "causal_conv1d", "--keep"))
    logs = list((record.folder(bed.settings, bed.plan.build_id) / "work").rglob(".ninja_log"))
    rows = [line.split("\t") for log in logs for line in log.read_text().splitlines() if not line.startswith("#")]
    return wall, union([(int(row[0]) / 1000, int(row[1]) / 1000) for row in rows])


def main() -> None:
    """Measure and print."""
    wall, compiling = whole_build(make_bed())
    print(f"build causal_conv1d {wall:.0f} s, in compilers {compiling:.0f} s, the rest {wall - compiling:.0f} s")
