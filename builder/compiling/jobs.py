"""How many compilations run beside each other: from cores, memory, and what earlier builds of the recipe needed."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import Field

from builder.box import meter
from builder.data.toolchain import schedule
from gracefarm.tables import Table, parse_size

OTHERS = 512 << 20
"Bytes beside the compilers: Python, with torch in it, and the build tools."


class Jobs(Table):
    """How many compilations ran beside each other, and why."""

    count: int = Field(description="Number of parallel compilations")
    reason: str = Field(description="Why this number was chosen")


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What the last success of a recipe showed."""

    count: int
    "Jobs that it ran."
    peak: int
    "Bytes, of the whole tree."
    killed_at: int | None
    "Bytes: the bound at which more jobs than `count` were killed before, or None."


def cores() -> int:
    """Processors this process may use: its affinity, or a cgroup's CPU quota where that is less, rounded up."""
    affinity, quota = len(os.sched_getaffinity(0)), meter.cpu_quota()
    return affinity if quota is None else max(1, min(affinity, math.ceil(quota)))


def plan(
    *,
    memory: int,
    memory_per_job: str,
    wanted: int | None,
    past: Learned | None = None,
    declared: Sequence[int] = (),
    peaks: Sequence[int] = (),
) -> Jobs:
    """The smaller of cores and what fits in `memory` bytes, at least one; `wanted` is an upper bound of the user's.

    `declared` are the bytes of the recipe's large units, which schedule.py keeps apart. What was seen corrects the recipe in
    both directions: where the `peaks` of all its units are known, as many jobs as they leave room for; else a count whose
    peak fits is allowed. More jobs than were killed in no less memory are not.
    """
    per_job = parse_size(memory_per_job)
    # The declared are few among the others.
    kinds = [*declared, *[per_job] * (len(declared) + 1)]
    by_memory = _by_units(memory, kinds) if declared else max(1, memory // per_job)
    apart = " and larger units kept apart" if declared else ""
    reason = f"{cores()} cores, {memory / 2**30:.1f} GiB of memory at {memory_per_job} a job{apart} allow {by_memory}"
    if peaks:
        # A unit may have grown by a tenth.
        by_memory = _by_units(memory - OTHERS, [peak * 11 // 10 for peak in peaks])
        reason += f"; the {len(peaks)} translation units of the last build leave room for {by_memory}"
        if past is not None and past.killed_at is not None and memory <= past.killed_at and past.count < by_memory:
            by_memory = past.count
            reason += f", more than {by_memory} were killed"
    elif past is not None:
        seen = _corrected(by_memory, memory, past)
        if seen != by_memory:
            by_memory = seen
            reason += f"; {past.count} jobs of the last build peaked at {past.peak / 2**30:.1f} GiB, so {by_memory}"
    count = min(cores(), by_memory, wanted or cores())
    if wanted is not None:
        reason += f", {wanted} asked for"
    return Jobs(count=count, reason=reason)


def _by_units(memory: int, peaks: Sequence[int]) -> int:
    """The most jobs, up to the cores, that schedule.py can keep within `memory`, and that most units can be had for."""
    fitting = [
        count
        for count in range(1, cores() + 1)
        if schedule.large_at_once(memory, peaks, count) is not None
        and 2 * sum(peak * count > memory for peak in peaks) <= len(peaks)
    ]
    return max(fitting, default=1)


def _corrected(by_memory: int, memory: int, past: Learned) -> int:
    if past.killed_at is not None and memory <= past.killed_at:
        return min(by_memory, past.count)
    if past.peak <= memory:
        return max(by_memory, past.count)
    # The last peak does not fit: as many jobs as do at its mean, though the declaration allows more.
    return max(1, min(by_memory, memory * past.count // past.peak))
