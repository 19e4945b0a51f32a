"""`deploy up`, `serve`, `down`, `purge` and `preflight`."""

from __future__ import annotations

import shlex
from pathlib import Path

import click
from rich.markup import escape
from rich.table import Column, Table

from deploy.cli.common import DeployContext, output, reporting
from deploy.cli.work import at_work, held, no_wait_option
from deploy.fleet import tunnels
from deploy.fleet.results import combined_error
from deploy.steps import order, preflight, remains, spares
from deploy.steps.order import Served, StepChoice
from deploy.steps.preflight_checks import NodeCheck
from deploy.steps.remains import Removed
from deploy.steps.step import Work, look_at_nodes
from gracefarm.errors import UsageError


@click.command()
@click.option("--from", "start", metavar="STEP", type=click.Choice(order.UP), help="Repeat this step and the later steps.")
@click.option("--skip", multiple=True, metavar="STEP", type=click.Choice(order.UP), help="Skip a step. Repeatable.")
@no_wait_option
@reporting
def up(context: DeployContext, start: str | None, skip: tuple[str, ...], no_wait: bool) -> None:
    """Prepare the nodes. Finished steps are not repeated.

    \b
    deploy up
    deploy up --from weights
    deploy up --skip cache

    The steps are preflight, cache (a local cache of a shared folder on NFS), environment, weights, and proof (preflight
    again, with the environment). environment and weights run at the same time.

    After Ctrl-C or kill -9, the same command continues where it stopped.
    """

    async def go(work: Work) -> bool:
        return await order.up(await spares.without_lost_spares(work), StepChoice(start=start, skip=skip))

    with held(context, no_wait=no_wait) as keeper:
        changed = at_work(context, keeper, go)
    context.console.result({"changed": changed}, "up to date" if not changed else "done; start the engine with `deploy serve`")


@click.command()
@click.option("--skip-up", is_flag=True, help="Do not run the steps of `deploy up` first.")
@no_wait_option
@reporting
def serve(context: DeployContext, skip_up: bool, no_wait: bool) -> None:
    """Start Ray and the engine, and wait until the engine has answered a completion. The unfinished steps of
    `deploy up` run first.

    \b
    deploy serve

    If the engine already runs or loads the model, the command waits for it. Ctrl-C does not stop the engine.
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
        f"       {curl_line(key, port)}",
    ]
    context.console.result(document, "\n".join(lines))


def curl_line(key: Path, port: int) -> str:
    """A shell command that lists the served models. The key goes through a pipe, since every user can read argument lists."""
    header = f'printf "Authorization: Bearer %s" "$(cat {shlex.quote(str(key))})"'  # printf is a shell builtin
    return f"{header} | curl -H @- http://127.0.0.1:{port}/v1/models"


@click.command()
@click.option("--keep-ray", is_flag=True, help="Stop only the engine.")
@no_wait_option
@reporting
def down(context: DeployContext, keep_ray: bool, no_wait: bool) -> None:
    """Stop the engine, Ray, builds, downloads and tunnels, and check that no process is left.

    \b
    deploy down

    Unreachable nodes are skipped and listed at the end. The command also removes copies of secrets from the nodes.
    """
    with held(context, no_wait=no_wait) as keeper:
        try:
            ended = at_work(context, keeper, lambda work: order.down(work, keep_ray=keep_ray))
        finally:
            tunnels.end_all(context.deployment.folder)  # also if a node cannot be reached
    what = "the engine is stopped, Ray is still running" if keep_ray else "no process of this deployment is running"
    text = ", ".join(f"{node} {count}" for node, count in ended.items() if count)
    context.console.result(
        {"ended": ended}, f"{what}" + (f"; processes stopped: {text}" if text else "; none was running before")
    )


@click.command()
@click.option("--share", is_flag=True, help="Also remove the deployment's environments in the shared folder.")
@click.option("--weights", is_flag=True, help="Also remove the model's files, which other deployments may use.")
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@no_wait_option
@reporting
def purge(context: DeployContext, share: bool, weights: bool, yes: bool, no_wait: bool) -> None:
    """Stop everything as `deploy down` does, then remove the deployment's files from the nodes: logs, secrets, Ray's files,
    uv.

    \b
    deploy purge --share

    The folder .deploy on this machine stays.
    """
    console, deployment = context.console, context.deployment
    what = ["jobs, logs, secrets and uv"] + (["environments"] if share else []) + (["the model's files"] if weights else [])
    question = f"Remove {', '.join(what)} from {len(deployment.nodes)} nodes?"
    if not yes and not (console.interactive and click.confirm(question, err=True)):
        raise UsageError(
            "nothing was removed, because the removal was not confirmed", remedy="to remove without asking, use --yes"
        )

    async def go(work: Work) -> Removed:
        await order.down(work)
        return await remains.purge(work, share=share, weights=weights)

    with held(context, no_wait=no_wait) as keeper:
        try:
            removed = at_work(context, keeper, go)
        finally:
            tunnels.end_all(deployment.folder)
        # Without their record, a later `purge --weights` would not find the model's files.
        kept = () if weights and not removed.failed else ("weights",)
        keeper.forget(*(name for name in keeper.state.steps if name not in kept))
    document = {"removed": removed.places, "bytes": removed.bytes}
    console.result(document, "\n".join([*removed.places, f"{removed.bytes / 1e9:.2f} GB removed"]))
    if removed.failed:
        raise combined_error(removed.failed, len(deployment.nodes))


@click.command("preflight")
@reporting
def preflight_command(context: DeployContext) -> None:
    """Run all checks on all nodes and pairs of nodes, and show failures with their remedy. The command changes nothing.

    \b
    deploy preflight
    """

    async def go(work: Work) -> list[NodeCheck]:
        return await preflight.cells_of(work, await look_at_nodes(work))

    with held(context) as keeper:
        cells = at_work(context, keeper, go)
    if context.console.as_json:
        context.console.result([cell.__dict__ for cell in cells])
    else:
        _print_cells(cells, [node.name for node in context.deployment.nodes])
    preflight.require(cells)


_COLOUR = {"ok": "green", "bad": "bold red", "warn": "yellow", "skipped": "dim"}


def _print_cells(cells: list[NodeCheck], names: list[str]) -> None:
    """Print one row per check and result, with the nodes. The remedy of the first red cell is in the error instead."""
    error = next((cell for cell in cells if cell.status == "bad"), None)
    table = Table("check", "nodes", Column("result", overflow="fold"), box=None, pad_edge=False)
    for check in preflight.ORDER:
        groups: dict[tuple[str, str], list[NodeCheck]] = {}
        for cell in cells:
            if cell.check == check:
                groups.setdefault((cell.status, cell.text), []).append(cell)
        for (status, text), same in groups.items():
            who = "all" if len(same) == len(names) else ",".join(cell.node for cell in same)
            table.add_row(check, who, f"[{_COLOUR[status]}]{status}[/] {escape(text)}")
            if same[0].remedy and error not in same:
                table.add_row("", "", f"[dim]→ {escape(same[0].remedy)}[/]")
    output().print(table)
