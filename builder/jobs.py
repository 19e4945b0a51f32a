"""How many compilations run beside each other."""

from __future__ import annotations

import os

from builder.record import Jobs
from gracefarm.tables import parse_size


def cores() -> int:
    """Processors this process may use; a cgroup's CPU quota is not an affinity and is left to the scheduler."""
    return len(os.sched_getaffinity(0))


def plan(*, memory: int, memory_per_job: str, wanted: int | None) -> Jobs:
    """The smaller of cores and what fits in `memory` bytes, at least one; `wanted` is an upper bound of the user's."""
    per_job = parse_size(memory_per_job)
    by_memory = max(1, memory // per_job)
    count = min(cores(), by_memory, wanted or cores())
    reason = f"{cores()} cores, {memory / 2**30:.1f} GiB of memory at {memory_per_job} a job allow {by_memory}"
    if wanted is not None:
        reason += f", {wanted} asked for"
    return Jobs(count=count, reason=reason)
