"""`deploy up`, `serve`, `down`, `preflight`, `env`, `weights`: what changes the nodes."""

from __future__ import annotations

import asyncio
import shlex
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import click
from rich.markup import escape
from rich.table import Column, Table

from deploy.cli.common import DeployContext, output, reporting
from deploy.fleet import tunnels
from deploy.fleet.ssh import open_fleet
from deploy.nodes import paths, redact, state
from deploy.nodes.facts import load_facts
from deploy.nodes.state import Keeper
from deploy.steps import environment, order, preflight, spares, weights
from deploy.steps.order import Served, StepChoice
from deploy.steps.preflight_checks import Cell
from deploy.steps.step import Work, look
from gracefarm import settings
from gracefarm.console import Console
from gracefarm.errors import ConfigError, ExitCode, GracefarmError, InstallError

T = TypeVar("T")
_GOES_ON = "interrupted; what is under way on the nodes goes on, and the same command attaches to it: `deploy down` ends it"


@contextmanager
def held(context: DeployContext, *, no_wait: bool = False) -> Iterator[Keeper]:
    """The state, for this command alone."""
    command = shlex.join(["deploy", *sys.argv[1:]])

    def waiting(who: str) -> None:
        context.console.step("wait", f"{who} is at work on this deployment; waiting for it")

    with state.hold(context.deployment.folder, command, wait=not no_wait, on_wait=waiting) as keeper:
        yield keeper


def at_work(context: DeployContext, keeper: Keeper, do: Callable[[Work], Awaitable[T]]) -> T:
    """`do` with connections to the nodes; Ctrl-C tells that what is detached goes on."""
    deployment = context.deployment
    facts = load_facts(deployment)
    for node in deployment.nodes:
        facts.node(node.name)
    clean = redact.of(deployment.folder).line  # causes are lines of other programs' logs

    async def go() -> T:
        async with open_fleet(deployment) as fleet:
            return await do(
                Work(
                    deployment=deployment,
                    fleet=fleet,
                    facts=facts,
                    keeper=keeper,
                    console=Console(as_json=context.console.as_json, clean=clean),
                    settings=settings.load(),
                )
            )

    try:
        return asyncio.run(go())
    except GracefarmError as error:
        raise type(error)(clean(error.cause), remedy=clean(error.remedy), repeat=error.repeat) from error
    except KeyboardInterrupt:
        context.console.event("error", _GOES_ON)
        sys.exit(ExitCode.INTERRUPTED)


no_wait_option = click.option("--no-wait", is_flag=True, help="Fail at once where another command is at work.")


@click.command()
@click.option("--from", "start", metavar="STEP", type=click.Choice(order.UP), help="Do this step and the later ones again.")
@click.option("--skip", multiple=True, metavar="STEP", type=click.Choice(order.UP), help="Leave a step out.")
@no_wait_option
@reporting
def up(context: DeployContext, start: str | None, skip: tuple[str, ...], no_wait: bool) -> None:
    """Preflight, NFS cache, environment, weights, proof: what is missing on the nodes, and no more.

    \b
    deploy up
    deploy up --from weights
    deploy up --skip cache

    Ctrl-C or kill -9 at any moment: the same command goes on from there.
    """
    with held(context, no_wait=no_wait) as keeper:
        changed = at_work(context, keeper, lambda work: _up(work, StepChoice(start=start, skip=skip)))
    context.console.result({"changed": changed}, "up to date" if not changed else "done: `deploy serve` starts the engine")


async def _up(work: Work, choice: StepChoice) -> bool:
    return await order.up(await spares.without_lost_spares(work), choice)


@click.command()
@click.option("--skip-up", is_flag=True, help="Do not look whether `deploy up` has something to do.")
@no_wait_option
@reporting
def serve(context: DeployContext, skip_up: bool, no_wait: bool) -> None:
    """Start Ray and the engine; READY when a real completion came back. Does `deploy up` first where it is needed.

    Repeated, it finds what runs already, or attaches to a load that goes on. Ctrl-C leaves the load going.
    """

    async def go(work: Work) -> Served:
        work = await spares.without_lost_spares(work)
        if not skip_up:
            await order.up(work)
        return await order.serve(work)

    with held(context, no_wait=no_wait) as keeper:
        served = at_work(context, keeper, go)
    deployment = context.deployment
    head, port = deployment.head, deployment.data.ports.engine
    key = deployment.folder.api_key
    document = {
        "ready": True,
        "plan": served.plan.id,
        "node": head.name,
        "port": port,
        "api_key_file": str(key),
        **served.engine.answer,
    }
    lines = [
        f"READY  {served.engine.answer['model']} on {head.name}, port {port} of its loopback",
        f"       deploy tunnel                          # http://127.0.0.1:{port} on this machine",
        f"       {ask(key, port)}",
    ]
    context.console.result(document, "\n".join(lines))


def ask(key: Path, port: int) -> str:
    """How a shell asks what is served: the key goes through a pipe, for argument lists are everybody's to read."""
    header = f'printf "Authorization: Bearer %s" "$(cat {shlex.quote(str(key))})"'  # printf is the shell's own: no process
    return f"{header} | curl -H @- http://127.0.0.1:{port}/v1/models"


@click.command()
@click.option("--keep-ray", is_flag=True, help="End the engine alone.")
@no_wait_option
@reporting
def down(context: DeployContext, keep_ray: bool, no_wait: bool) -> None:
    """End the engine, Ray, builds and downloads on every node, and look that nothing of ours is left; tunnels here too.

    A node that is away keeps nothing running on the others; it is told at the end.
    """
    with held(context, no_wait=no_wait) as keeper:
        try:
            ended = at_work(context, keeper, lambda work: order.down(work, keep_ray=keep_ray))
        finally:
            tunnels.end_all(context.deployment.folder)  # also where a node is away
    what = "the engine is down, Ray runs on" if keep_ray else "nothing of this deployment runs any more"
    text = ", ".join(f"{node} {count}" for node, count in ended.items() if count)
    context.console.result({"ended": ended}, f"{what}" + (f"; processes ended: {text}" if text else "; nothing ran"))


@click.command("preflight")
@reporting
def preflight_command(context: DeployContext) -> None:
    """Every check on every node and pair, as a table; red cells with their remedy. Changes nothing."""

    async def go(work: Work) -> list[Cell]:
        return await preflight.cells_of(work, await look(work))

    with held(context) as keeper:
        cells = at_work(context, keeper, go)
    if context.console.as_json:
        context.console.result([cell.__dict__ for cell in cells])
    else:
        _print_cells(cells, [node.name for node in context.deployment.nodes])
    preflight.require(cells)


_COLOUR = {"ok": "green", "bad": "bold red", "warn": "yellow", "skipped": "dim"}


def _print_cells(cells: list[Cell], names: list[str]) -> None:
    """One row per check; a row whose nodes all say the same is one cell."""
    table = Table("check", "nodes", Column("what was found", overflow="fold"), box=None, pad_edge=False)
    for check in preflight.ORDER:
        groups: dict[tuple[str, str], list[str]] = {}
        for cell in cells:
            if cell.check == check:
                groups.setdefault((cell.status, cell.text), []).append(cell.node)
        for (status, text), nodes in groups.items():
            who = "all" if len(nodes) == len(names) else ",".join(nodes)
            table.add_row(check, who, f"[{_COLOUR[status]}]{status}[/] {escape(text)}")
    output().print(table)


# environments


@click.group()
def env() -> None:
    """Environments on the shared folder: build, list, import everywhere, roll back, collect."""


@env.command("up")
@no_wait_option
@reporting
def env_up(context: DeployContext, no_wait: bool) -> None:
    """Build the environment of the set's lock unless it is there, import it on all nodes, make it active."""
    others = [name for name in order.UP if name not in ("environment", "proof")]
    with held(context, no_wait=no_wait) as keeper:
        keeper.forget("environment")  # a roll-back counts no longer
        changed = at_work(context, keeper, lambda work: _up(work, StepChoice(skip=others)))
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


# weights


@click.group("weights")
def weights_group() -> None:
    """The model's files on the shared folder."""


@weights_group.command("verify")
@click.option("--remove", is_flag=True, help="Take away what is wrong, so that `deploy up` brings it again.")
@reporting
def weights_verify(context: DeployContext, remove: bool) -> None:
    """Hash every file again, dealt over all nodes."""
    deployment = context.deployment
    with held(context) as keeper:
        kept = keeper.state.data("weights")
        if not kept:
            raise ConfigError("there are no weights yet", remedy="`deploy up` brings them")
        spec = weights.WeightsSpec(root=paths.root(deployment), repo=deployment.data.model.repo)
        wrong = at_work(context, keeper, lambda work: weights.verify(work.nodes, spec, str(kept["commit"]), remove=remove))
        if wrong and remove:
            keeper.forget("weights")
    if wrong:
        raise InstallError(
            f"{len(wrong)} files are wrong or missing: {', '.join(wrong[:3])}",
            remedy="`deploy up` brings them again" if remove else "`deploy weights verify --remove`, then `deploy up`",
        )
    context.console.result({"wrong": wrong}, "every file is what the Hub declares")
