"""The order of the steps of `up`, `serve` and `down`: check every node once, do what is missing, store what was done.

A step that is done in the state is repeated only if its inputs have changed, or if the check finds its results missing.
Builds of environments, downloads, Ray and the engine are detached jobs with the deployment's mark. They continue without this
process and without a connection. The same command finds them again, and `down` stops them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from deploy.fleet.results import combined_error
from deploy.planning.plans import ServePlan
from deploy.steps import cache, environment, processes, remains, served_plan
from deploy.steps.cache import CacheStep
from deploy.steps.download_environment import DownloadStep
from deploy.steps.engine import EngineStep
from deploy.steps.environment import EnvironmentStep
from deploy.steps.preflight import PreflightStep
from deploy.steps.proof import ProofStep
from deploy.steps.ray import RayStep
from deploy.steps.step import Applied, Step, Work, ask_briefly, look_at_nodes, perform, perform_all, side_by_side
from deploy.steps.weights import WeightsStep
from gracefarm.errors import GracefarmError, UsageError

Lane = tuple[Step, ...]
"Steps that run in sequence. The name of the last one is the name of the lane on the command line."
FIRST: tuple[Lane, ...] = ((PreflightStep(),), (CacheStep(),))
TOGETHER: tuple[Lane, ...] = ((EnvironmentStep(),), (DownloadStep(), WeightsStep()))
LAST: tuple[Lane, ...] = ((ProofStep(),),)
UP = tuple(lane[-1].name for lane in (*FIRST, *TOGETHER, *LAST))
"Lanes of `up` in order. Environment and weights run in parallel."
RAY, ENGINE = RayStep(), EngineStep()
SERVE = (RAY.name, ENGINE.name)


@dataclass(frozen=True, kw_only=True)
class StepChoice:
    """Steps that the user wants to repeat or skip."""

    start: str | None = None
    "Repeat this step and all later ones, even if the state says that they are done."
    skip: Collection[str] = ()

    def check(self, known: Sequence[str] = UP) -> None:
        """Check the names of the steps. Raises UsageError."""
        for name in (*([self.start] if self.start else []), *self.skip):
            if name not in known:
                raise UsageError(f"unknown step {name!r}", remedy=f"give one of these steps: {', '.join(known)}")

    def wants(self, lane: Lane) -> bool:
        """True if the lane is not skipped."""
        return lane[-1].name not in self.skip


@dataclass(frozen=True, kw_only=True)
class Served:
    """The plan that is served, and the result of starting the engine."""

    plan: ServePlan
    engine: Applied


async def up(work: Work, choice: StepChoice | None = None) -> bool:
    """Prepare every node for serving. Return whether anything was done.

    Raises:
        GracefarmError: a step failed. The steps before it stay done.
    """
    chosen = choice or StepChoice()
    chosen.check()
    if chosen.start:
        work = replace(work, again=UP[UP.index(chosen.start) :])
    looks = await look_at_nodes(work)
    changed = False
    for lane in filter(chosen.wants, FIRST):
        changed = await perform_all(lane, work, looks) or changed
    # This is not a step, since the state of older deployments does not have it, and it must precede all other lanes.
    if any(seen.get("owner") != work.fleet.mark for seen in looks.values()):
        await environment.claim(work)
    changed = await side_by_side([lane for lane in TOGETHER if chosen.wants(lane)], work, looks) or changed
    # This completes the record of the step `cache`, which ran before there was a file to measure with.
    if CacheStep.name not in chosen.skip:
        changed = await cache.measure_new(work) or changed
    for lane in filter(chosen.wants, LAST):
        changed = await perform_all(lane, work, looks) or changed
    return changed


async def serve(work: Work) -> Served:
    """Start Ray and the engine of the plan, from the active environment. Processes that already run are not started again.

    Raises:
        EngineError: with the first cause. Ray continues to run if the engine fails; `down` stops both.
    """
    plan = await served_plan.plan_of(work)
    for note in plan.notes:  # such as nodes that are not used
        work.console.warn(note)
    seen = await ask_briefly(work.nodes[0], {"prefix": processes.NO_MARK, "root": work.environment_root})
    work = replace(work, plan=plan, environment=seen["environments"].get("env") or "")
    await perform(RAY, work, {})
    applied = await perform(ENGINE, work, {})
    assert applied
    return Served(plan=plan, engine=applied)


async def down(work: Work, *, keep_ray: bool = False) -> dict[str, int]:
    """Stop the engine, then Ray, check that none of our processes is left, and remove the secrets.

    Returns:
        Number of stopped processes by node.

    Raises:
        NodeError, SshError: after all other nodes are done: a process could not be stopped, or a node was not reached.
    """
    before_ray = (
        ENGINE,
        *(step for lane in (*FIRST, *TOGETHER, *LAST) for step in lane),
    )  # stopped before Ray, since they remove their own files
    ended: dict[str, int] = {}
    failed: dict[str, GracefarmError] = {}
    for steps in ((ENGINE,),) if keep_ray else (before_ray, (RAY,)):
        for counts, errors in await asyncio.gather(*(step.undo(work) for step in steps)):
            ended = {node: ended.get(node, 0) + counts.get(node, 0) for node in {**ended, **counts}}
            failed |= errors
    if not keep_ray:
        failed |= await remains.remove_secrets(work, [node for node in work.nodes if node.name not in failed])
    work.keeper.forget(*((ENGINE.name,) if keep_ray else SERVE))
    if failed:
        raise unfinished(failed, ended, len(work.nodes))
    return ended


def unfinished(failed: Mapping[str, GracefarmError], ended: Mapping[str, int], of: int) -> GracefarmError:
    """The error of an incomplete `down`: what failed on which nodes, and what was stopped on the others."""
    error = combined_error(failed, of)
    others = [f"{count} on {node}" for node, count in ended.items() if node not in failed and count]
    clean = [node for node in ended if node not in failed]
    stopped = (
        f"processes stopped on the other nodes: {', '.join(others)}" if others else "nothing was running on the other nodes"
    )
    stopped = stopped if clean else "nothing could be stopped"
    away = ", ".join(failed)
    remedy = f"repeat `deploy down`, since processes on {away} may still run and cost money; {error.remedy}"
    return type(error)(f"{error.cause}; {stopped}", remedy=remedy, repeat="deploy down")
