"""`deploy env`: environments in the shared folder."""

from __future__ import annotations

import click

from deploy.cli.common import DeployContext, reporting
from deploy.cli.work import at_work, held, no_wait_option
from deploy.nodes import paths
from deploy.steps import environment, order, spares
from deploy.steps.order import StepChoice
from deploy.steps.step import Work
from gracefarm.cli import CommandGroup
from gracefarm.console import counted


@click.group(cls=CommandGroup)
def env() -> None:
    """Build, list, switch and remove environments in the shared folder.

    An environment is a Python environment with the engine (the program that serves the model) and all packages of its
    lock file. It is in the folder that all nodes share.

    \b
    # Build the environment that deploy.toml describes, and activate it.
    deploy env up
    # List all environments.
    deploy env list
    """


@env.command("up")
@no_wait_option
@reporting
def env_up(context: DeployContext, no_wait: bool) -> None:
    """Build the environment if it does not exist, test it on all nodes, and activate it.

    An environment is a Python environment with the engine (the program that serves the model) and all packages of its
    lock file. It is in the folder that all nodes share. The test imports the modules of the engine on each node. The
    next `deploy serve` uses the active environment.

    \b
    # Build the environment that deploy.toml describes, and activate it.
    deploy env up
    """
    others = [name for name in order.UP if name not in ("environment", "proof")]

    async def go(work: Work) -> bool:
        return await order.up(await spares.without_lost_spares(work), StepChoice(skip=others))

    with held(context, no_wait=no_wait) as keeper:
        keeper.forget("environment")  # forget a rollback
        changed = at_work(context, keeper, go)
    context.console.result({"changed": changed}, "the environment is active" if changed else "nothing to do")


@env.command("list")
@reporting
def env_list(context: DeployContext) -> None:
    """List the environments in the shared folder, newest first.

    An environment is a Python environment with the engine (the program that serves the model) or with the program that
    downloads models. Each line shows the id of an environment, the name of its set of wheels, and its state. The state is
    `env` (the engine uses it), `download` (downloads use it) or `-` (not used).

    \b
    # List all environments.
    deploy env list
    """
    root = paths.environment_root(context.deployment)
    with held(context) as keeper:
        listed = at_work(context, keeper, lambda work: environment.listing(work.nodes[:1], root))
    lines = [
        f"{each['id'][:12]}  {each['set'] or '-':24}  {' '.join(each['active']) or '-'}" for each in listed["environments"]
    ] or ["no environment yet; build one with `deploy env up`"]
    context.console.result(listed, "\n".join(lines))


@env.command("matrix")
@reporting
def env_matrix(context: DeployContext) -> None:
    """Test the active environment on every node again.

    The active environment is the Python environment that `deploy serve` uses. It contains the engine (the program that
    serves the model). On each node, the command imports the modules of the engine, and runs the engine's test commands. It
    prints a line for each test, with the duration.

    \b
    # Repeat the tests.
    deploy env matrix
    """
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
    """Activate the environment that was active before the current environment.

    An environment is a Python environment with the engine (the program that serves the model) and all packages of its lock
    file. The next `deploy serve` uses the activated environment. A running engine continues with its old environment.
    `deploy env up` undoes the rollback.

    \b
    # Activate the previous environment.
    deploy env rollback
    """
    with held(context) as keeper:
        answer = at_work(context, keeper, environment.roll_back)
    text = (
        f"{answer['active'][:12]} is active (before: {(answer['from'] or 'none')[:12]}), and the next `deploy serve` uses it"
    )
    context.console.result(answer, text + "; undo the rollback with `deploy env up`")


@env.command("gc")
@click.option(
    "--keep",
    default=2,
    show_default=True,
    type=click.IntRange(1),
    metavar="N",
    help="Number of environments to keep of each kind: N with the engine, and N with the download program. The command "
    "keeps the most recently activated environments.",
)
@reporting
def env_gc(context: DeployContext, keep: int) -> None:
    """Remove old environments that no process on any node uses.

    Environments are Python environments in the folder that all nodes share. They contain the engine (the program that serves
    the model) or the program that downloads models. One environment with the engine is active, and one with the download
    program. These two environments always stay. Environments that are less than an hour old also stay.

    \b
    # Keep one environment with the engine, and one with the download program.
    deploy env gc --keep 1
    """
    root = paths.environment_root(context.deployment)
    with held(context) as keeper:
        answer = at_work(context, keeper, lambda work: environment.collect(work.nodes, root, keep=keep))
    text = f"{counted(len(answer['removed']), 'environment')} removed, {answer['freed'] / 1e9:.1f} GB freed"
    context.console.result(answer, text + (f"; in use: {', '.join(answer['in_use'])}" if answer["in_use"] else ""))
