"""Facts from records of earlier builds of a recipe, for the next one: jobs, costs of translation units, time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from builder.compiling.jobs import Learned
from builder.compiling.units import Unit
from builder.planning.plan import Plan
from builder.planning.settings import Settings
from builder.proof import record
from builder.proof.record import Likeness, Record
from builder.toolchains.kinds import KINDS
from gracefarm.console import Tick


def measured(plan: Plan, settings: Settings) -> list[Record]:
    """Records of the plan's recipe with measured costs of compilers, newest first; none if the toolchain does not measure."""
    if not plan.toolchain.measured:
        return []
    return [build for build in record.all_of(settings, plan.recipe.key) if KINDS[build.toolchain].measured]


def like(plan: Plan) -> Likeness:
    """The properties of a record that must match those of the plan, so that the builds have similar costs."""
    return record.likeness(plan.stack.data.name, plan.inputs)


def but_python(plan: Plan) -> tuple[object, ...]:
    """Equal for plans that differ only in Python."""
    return plan.recipe.key, plan.stack.folder, plan.target, plan.stack.asked_sm, plan.stack.asked_ptx


def stable(recipe: str, records: Sequence[Record]) -> bool | None:
    """Whether the newest wheel of a recipe has the stable ABI; None: there is no wheel. `records` newest first."""
    names = (build.wheel.filename for build in records if build.recipe == recipe and build.wheel is not None)
    return next(("-abi3" in name for name in names), None)


def learned_jobs(records: Iterable[Record], like: Likeness) -> Learned | None:
    """The last successful, similar build in records of one recipe, newest first; or None."""
    for build in records:
        if (build.compiler_cache and build.compiler_cache.hits) or (build.device_code and build.device_code.taken):
            continue  # results from a cache use no memory
        if build.outcome != "built" or build.like != like or build.jobs is None:
            continue
        compiles = [stage for stage in build.stages if stage.name == "compile" and stage.peak_memory]
        if compiles:
            # More than one: the earlier compiles were killed for memory, and the last had the record's number of jobs.
            killed = compiles[-2].memory_bound if len(compiles) > 1 else None
            return Learned(count=build.jobs.count, peak=compiles[-1].peak_memory or 0, killed_at=killed)
    return None


def learned_units(records: Iterable[Record], like: Likeness) -> dict[str, Unit]:
    """Costs of units in earlier builds of one recipe, including failed ones; `records` newest first, the first counts."""
    units: dict[str, Unit] = {}
    for build in records:
        if build.like == like:
            units = dict(build.units) | units
    return units


def time_left(plan: Plan, settings: Settings, tick: Tick) -> Callable[[int, int], None]:
    """Progress with the remaining time, from the last successful, similar build, else from the speed so far."""
    wanted = like(plan)
    records = record.all_of(settings, plan.recipe.key)
    past = next((build for build in records if build.outcome == "built" and build.like == wanted), None)
    before = next((stage.wall_s for stage in past.stages if stage.name == "compile"), None) if past else None
    start = time.monotonic()

    def progress(finished: int, total: int) -> None:
        elapsed = time.monotonic() - start
        expected = before or (elapsed / finished * total if finished else None)
        left = "" if expected is None else f"about {max(0.0, expected - elapsed) / 60:.0f} min left"
        tick(finished, total, f"translation units, {left} ({'as in the last build' if before else 'at the current speed'})")

    return progress
