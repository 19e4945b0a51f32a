"""The order of the steps of `up`, `serve` and `down`: look at every node once, do what is missing, remember what was done.

A step that the state calls done is done again only when what it depends on has changed, or when the look denies it.
What runs long on the nodes survives this process and every cut: builds of environments, downloads, Ray and the engine are
detached jobs with the deployment's mark; the same command finds them again, and `down` ends them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from deploy.fleet.results import combined_error
from deploy.planning.plans import ServePlan
from deploy.steps import cache, environment, processes, remains, served_plan
from deploy.steps.cache import CacheStep
from deploy.steps.download import DownloadStep
from deploy.steps.engine import EngineStep
from deploy.steps.environment import EnvironmentStep
from deploy.steps.preflight import PreflightStep
from deploy.steps.proof import ProofStep
from deploy.steps.ray import RayStep
from deploy.steps.step import Applied, Step, Work, ask_briefly, look_at_nodes, perform, perform_all, side_by_side
from deploy.steps.weights import WeightsStep
from gracefarm.errors import GracefarmError, UsageError

Lane = tuple[Step, ...]
"Steps one after the other. The last one gives it its name on the command line."
FIRST: tuple[Lane, ...] = ((PreflightStep(),), (CacheStep(),))
TOGETHER: tuple[Lane, ...] = ((EnvironmentStep(),), (DownloadStep(), WeightsStep()))
LAST: tuple[Lane, ...] = ((ProofStep(),),)
UP = tuple(lane[-1].name for lane in (*FIRST, *TOGETHER, *LAST))
"Lanes of `up`, in their order; environment and weights go side by side."
RAY, ENGINE = RayStep(), EngineStep()
SERVE = (RAY.name, ENGINE.name)


@dataclass(frozen=True, kw_only=True)
class StepChoice:
    """What a person wants done otherwise."""

    start: str | None = None
    "Steps from this one on are done again, whatever the state says."
    skip: Collection[str] = ()

    def check(self, known: Sequence[str] = UP) -> None:
        """Raises UsageError: no such step."""
        for name in (*([self.start] if self.start else []), *self.skip):
            if name not in known:
                raise UsageError(f"no step {name!r}", remedy=f"there are: {', '.join(known)}")

    def wants(self, lane: Lane) -> bool:
        """It is not to be left out."""
        return lane[-1].name not in self.skip


@dataclass(frozen=True, kw_only=True)
class Served:
    """What answers, and how it was reached."""

    plan: ServePlan
    engine: Applied


async def up(work: Work, choice: StepChoice | None = None) -> bool:
    """Everything that serving needs, on every node; returns whether anything was done.

    Raises:
        GracefarmError: the first step that failed; what was done before it stays done.
    """
    chosen = choice or StepChoice()
    chosen.check()
    if chosen.start:
        work = replace(work, again=UP[UP.index(chosen.start) :])
    looks = await look_at_nodes(work)
    changed = False
    for lane in filter(chosen.wants, FIRST):
        changed = await perform_all(lane, work, looks) or changed
    # No step of its own: the state of older deployments does not know it, and it has to come before all lanes that follow.
    if any(seen.get("owner") != work.fleet.mark for seen in looks.values()):
        await environment.claim(work)
    lanes = {lane[-1].name: perform_all(lane, work, looks) for lane in TOGETHER if chosen.wants(lane)}
    changed = await side_by_side(work.console, lanes) or changed
    # It completes the record of the step `cache`, which was done when there was no file yet to measure with.
    if CacheStep.name not in chosen.skip:
        changed = await cache.measure_new(work) or changed
    for lane in filter(chosen.wants, LAST):
        changed = await perform_all(lane, work, looks) or changed
    return changed


async def serve(work: Work) -> Served:
    """Ray and the engine by the plan, from the environment that is active now; nothing is started twice.

    Raises:
        EngineError: with the first cause. Ray stays as it is when the engine fails; `down` ends both.
    """
    plan = await served_plan.plan_of(work)
    seen = await ask_briefly(work.nodes[0], {"prefix": processes.NO_MARK, "root": work.environment_root})
    work = replace(work, plan=plan, environment=seen["environments"].get("env") or "")
    await perform(RAY, work, {})
    applied = await perform(ENGINE, work, {})
    assert applied
    return Served(plan=plan, engine=applied)


async def down(work: Work, *, keep_ray: bool = False) -> dict[str, int]:
    """End the engine, then Ray, look that nothing of ours is left, and remove the secrets; node to how many processes ended.

    Raises:
        NodeError: something is left; SshError: a node was not reached. After everything on all others was stopped.
    """
    before_ray = (ENGINE, *(step for lane in (*FIRST, *TOGETHER, *LAST) for step in lane))  # they clean up behind themselves
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
    """Why `down` is not over: what failed where, what was ended on the others, and that it is to be repeated."""
    error = combined_error(failed, of)
    others = [f"{node} ({count})" for node, count in ended.items() if node not in failed and count]
    clean = [node for node in ended if node not in failed]
    done = f"ended on the others: {', '.join(others)} processes" if others else "nothing ran on the others"
    done = done if clean else "nothing could be ended"
    away = ", ".join(failed)
    remedy = f"repeat `deploy down` for {away}: what ran there may still run, and cost; {error.remedy}"
    return type(error)(f"{error.cause}; {done}", remedy=remedy, repeat="deploy down")
