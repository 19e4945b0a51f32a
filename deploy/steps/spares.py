"""Spares: nodes that no plan needs. One that cannot be reached holds nobody up."""

from __future__ import annotations

from dataclasses import replace

from deploy.steps import served_plan
from deploy.steps.step import Work


async def without_lost_spares(work: Work) -> Work:
    """Without the nodes that no plan needs and that cannot be reached: nothing is to run there, so nothing waits for them.

    What is done meanwhile is done for them too, once they are back: every step depends on which nodes there are.
    """
    plan = await served_plan.likely_plan(work)
    spares = {node.name for node in work.deployment.nodes} & set(plan.spares) if plan else ()
    tried = await work.fleet.connect(sorted(spares))
    lost = {name: error for name, error in tried.items() if error}
    for error in lost.values():
        work.console.warn(f"{error.cause}; it is a spare: going on without it")
    return replace(work, away=tuple(lost))
