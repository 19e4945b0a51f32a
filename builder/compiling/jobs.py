"""The number of parallel compilations, from cores, memory and earlier builds of the recipe."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

from builder.box import meter
from builder.data.toolchain import schedule
from gracefarm.tables import Table, parse_size

OTHERS = 512 << 20
"Memory of other processes than compilers, in bytes: Python with torch, and the build tools."


class Jobs(Table):
    """Number of parallel compile jobs, and the reason."""

    count: int
    "Number of parallel compile jobs"
    reason: str
    "Reason for this number"


@dataclass(frozen=True, kw_only=True)
class Learned:
    """Facts from the last successful build of a recipe."""

    count: int
    "Number of its jobs."
    peak: int
    "Peak memory of the process tree, in bytes."
    killed_at: int | None
    "The memory limit, in bytes, at which a build with more jobs than `count` was killed, or None."


def cores() -> int:
    """Number of processors that this process may use: its affinity, or a smaller CPU quota of a cgroup, rounded up."""
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
    """The smaller of the cores and the jobs that fit into `memory` bytes, at least one; `wanted` is the user's limit.

    `declared` is the memory of the recipe's large units, which schedule.py does not run together. Measurements replace the
    recipe's values: with the `peaks` of all units the number of jobs that fit is known; otherwise a count whose peak fits is
    allowed. A count that was killed with the same or more memory is not allowed.
    """
    per_job = parse_size(memory_per_job)
    # There are few declared units.
    kinds = [*declared, *[per_job] * (len(declared) + 1)]
    by_memory = _by_units(memory, kinds) if declared else max(1, memory // per_job)
    apart = ", without two large units at once," if declared else ""
    memory_text = f"{memory / 2**30:.1f} GiB of memory with {memory_per_job} per job{apart}"
    reason = f"{cores()} cores; {memory_text} allow {_jobs(by_memory)}"
    if peaks:
        # A unit may have grown by a tenth.
        by_memory = _by_units(memory - OTHERS, [peak * 11 // 10 for peak in peaks])
        reason += f"; the memory use of {len(peaks)} translation units in the last build allows {_jobs(by_memory)}"
        if past is not None and past.killed_at is not None and memory <= past.killed_at and past.count < by_memory:
            by_memory = past.count
            reason += f"; a build with more than {_jobs(by_memory)} exceeded this memory"
    elif past is not None:
        seen = _corrected(by_memory, memory, past)
        if seen != by_memory:
            by_memory = seen
            peak = f"{past.peak / 2**30:.1f} GiB"
            reason += (
                f"; the last build used at most {peak} of memory with {_jobs(past.count)}, which allows {_jobs(by_memory)} now"
            )
    count = min(cores(), by_memory, wanted or cores())
    if wanted is not None:
        reason += f"; the requested limit is {wanted}"
    return Jobs(count=count, reason=reason)


def _jobs(count: int) -> str:
    return "1 job" if count == 1 else f"{count} jobs"


def _by_units(memory: int, peaks: Sequence[int]) -> int:
    """The largest number of jobs, at most that of cores, with which schedule.py can run most units within `memory`."""
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
    # The last peak does not fit: use the number of jobs that fits at its mean, even if the declaration allows more.
    return max(1, min(by_memory, memory * past.count // past.peak))
