"""What the records of earlier builds of a recipe teach the next one: jobs, costs of translation units, time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from builder.compiling.jobs import Learned
from builder.compiling.units import Unit
from builder.planning.plan import Plan
from builder.planning.settings import Settings
from builder.proof import record
from builder.proof.record import Likeness, Record
from builder.toolchains import KINDS
from gracefarm.console import Tick


def measured(plan: Plan, settings: Settings) -> list[Record]:
    """Records of the plan's recipe that say what its compilers take, newest first; none where it is not measured anyway."""
    if not plan.toolchain.measured:
        return []
    return [build for build in record.all_of(settings, plan.recipe.key) if KINDS[build.toolchain].measured]


def like(plan: Plan) -> Likeness:
    """What a record has in common with the plan whose build takes about as much."""
    return record.likeness(plan.stack.data.name, plan.inputs)


def learned_jobs(records: Iterable[Record], like: Likeness) -> Learned | None:
    """From records of one recipe, newest first: the last success of its like, or None."""
    for build in records:
        if (build.compiler_cache and build.compiler_cache.hits) or (build.device_code and build.device_code.taken):
            continue  # what comes from a cache takes no memory
        if build.outcome != "built" or build.like != like or build.jobs is None:
            continue
        compiles = [stage for stage in build.stages if stage.name == "compile" and stage.peak_memory]
        if compiles:
            # More than one: the earlier ones were killed by memory, and the last ran with the fewer jobs of the record.
            killed = compiles[-2].memory_bound if len(compiles) > 1 else None
            return Learned(count=build.jobs.count, peak=compiles[-1].peak_memory or 0, killed_at=killed)
    return None


def learned_units(records: Iterable[Record], like: Likeness) -> dict[str, Unit]:
    """What units cost in earlier builds of one recipe, failed ones too; `records` newest first, and the newest word counts."""
    units: dict[str, Unit] = {}
    for build in records:
        if build.like == like:
            units = dict(build.units) | units
    return units


def time_left(plan: Plan, settings: Settings, tick: Tick) -> Callable[[int, int], None]:
    """Progress with the time left, from the last success of such a build or else from the pace so far."""
    wanted = like(plan)
    records = record.all_of(settings, plan.recipe.key)
    past = next((build for build in records if build.outcome == "built" and build.like == wanted), None)
    before = next((stage.wall_s for stage in past.stages if stage.name == "compile"), None) if past else None
    start = time.monotonic()

    def progress(done: int, total: int) -> None:
        elapsed = time.monotonic() - start
        expected = before or (elapsed / done * total if done else None)
        left = "" if expected is None else f"about {max(0.0, expected - elapsed) / 60:.0f} min left"
        tick(done, total, f"translation units, {left} ({'last time' if before else 'by the pace so far'})")

    return progress
