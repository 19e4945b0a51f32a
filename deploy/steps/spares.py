"""Spare nodes, which the plan does not need. They are ignored if they cannot be reached."""

from __future__ import annotations

from dataclasses import replace

from deploy.steps import served_plan
from deploy.steps.step import Work


async def without_lost_spares(work: Work) -> Work:
    """The same work without spare nodes that cannot be reached.

    When these nodes are back, the steps are repeated for them, since the inputs of every step contain the list of nodes.
    """
    plan = await served_plan.likely_plan(work)
    spares = {node.name for node in work.deployment.nodes} & set(plan.spares) if plan else ()
    tried = await work.fleet.connect(sorted(spares))
    lost = {name: error for name, error in tried.items() if error}
    for error in lost.values():
        work.console.warn(f"{error.cause}; this node is a spare and is ignored")
    return replace(work, away=tuple(lost))
