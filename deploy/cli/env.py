"""`deploy env`: environments on the shared folder."""

from __future__ import annotations

import click

from deploy.cli.common import DeployContext, reporting
from deploy.cli.work import at_work, held, no_wait_option
from deploy.nodes import paths
from deploy.steps import environment, order, spares
from deploy.steps.order import StepChoice
from deploy.steps.step import Work


@click.group()
def env() -> None:
    """Environments on the shared folder: build, list, import everywhere, roll back, collect."""


@env.command("up")
@no_wait_option
@reporting
def env_up(context: DeployContext, no_wait: bool) -> None:
    """Build the environment of the set's lock unless it is there, import it on all nodes, make it active."""
    others = [name for name in order.UP if name not in ("environment", "proof")]

    async def go(work: Work) -> bool:
        return await order.up(await spares.without_lost_spares(work), StepChoice(skip=others))

    with held(context, no_wait=no_wait) as keeper:
        keeper.forget("environment")  # a roll-back counts no longer
        changed = at_work(context, keeper, go)
    context.console.result({"changed": changed}, "active" if changed else "nothing to do")


@env.command("list")
@reporting
def env_list(context: DeployContext) -> None:
    """Finished environments, newest first, and which are active."""
    root = paths.environment_root(context.deployment)
    with held(context) as keeper:
        listed = at_work(context, keeper, lambda work: environment.listing(work.nodes[:1], root))
    lines = [
        f"{each['id'][:12]}  {each['set'] or '-':24}  {' '.join(each['active']) or '-'}" for each in listed["environments"]
    ] or ["no environment yet: `deploy env up`"]
    context.console.result(listed, "\n".join(lines))


@env.command("matrix")
@reporting
def env_matrix(context: DeployContext) -> None:
    """Import every module of the active environment on every node again."""
    deployment = context.deployment
    wanted = environment.matrix(deployment.matrix)
    with held(context) as keeper:
        folder = paths.environment(deployment)
        matrix = at_work(context, keeper, lambda work: environment.prove(work.nodes, folder, wanted, 600))
    lines = [
        f"{node}  {row['name']}: {row.get('skipped') or str(row['seconds']) + ' s'}"
        for node, rows in matrix.items()
        for row in rows
    ]
    context.console.result(matrix, "\n".join(lines))


@env.command("rollback")
@reporting
def env_rollback(context: DeployContext) -> None:
    """Make the environment active that was active before; a running engine keeps the one that it started with."""
    with held(context) as keeper:
        answer = at_work(context, keeper, environment.roll_back)
    text = f"{answer['active'][:12]} is active (was {(answer['from'] or 'none')[:12]}); `deploy serve` starts with it"
    context.console.result(answer, text + "; `deploy env up` goes forward again")


@env.command("gc")
@click.option("--keep", default=2, show_default=True, type=click.IntRange(1), help="Generations that stay for a roll-back.")
@reporting
def env_gc(context: DeployContext, keep: int) -> None:
    """Remove old environments that no process on any node runs from."""
    root = paths.environment_root(context.deployment)
    with held(context) as keeper:
        answer = at_work(context, keeper, lambda work: environment.collect(work.nodes, root, keep=keep))
    text = f"{len(answer['removed'])} removed, {answer['freed'] / 1e9:.1f} GB freed"
    context.console.result(answer, text + (f"; in use: {', '.join(answer['in_use'])}" if answer["in_use"] else ""))
