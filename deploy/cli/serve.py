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
@click.option(
    "--from",
    "start",
    metavar="STEP",
    type=click.Choice(order.UP),
    help="Repeat this step and all later steps, even if they are finished.",
)
@click.option(
    "--skip",
    multiple=True,
    metavar="STEP",
    type=click.Choice(order.UP),
    help="Do not run this step. The option can be repeated.",
)
@no_wait_option
@reporting
def up(context: DeployContext, start: str | None, skip: tuple[str, ...], no_wait: bool) -> None:
    """Prepare the nodes (the machines in deploy.toml) for `deploy serve`.

    The command runs these steps, and does not repeat finished steps:

    \b
    preflight    check the nodes and the network between them
    cache        if the shared folder is NFS, cache its files on each node's disk
    environment  install the engine (the program that serves the model)
    weights      download the model; runs at the same time as environment
    proof        check the nodes again, with the installed software

    After Ctrl-C, builds and downloads on the nodes continue. Run the same command again to wait for these jobs.

    \b
    # Run all steps that are not finished.
    deploy up
    # Repeat the steps weights and proof.
    deploy up --from weights
    # Run all unfinished steps except cache.
    deploy up --skip cache
    """

    async def go(work: Work) -> bool:
        return await order.up(await spares.without_lost_spares(work), StepChoice(start=start, skip=skip))

    with held(context, no_wait=no_wait) as keeper:
        changed = at_work(context, keeper, go)
    context.console.result({"changed": changed}, "up to date" if not changed else "done; start the engine with `deploy serve`")


@click.command()
@click.option("--skip-up", is_flag=True, help="Do not run the steps of `deploy up`.")
@no_wait_option
@reporting
def serve(context: DeployContext, skip_up: bool, no_wait: bool) -> None:
    """Start the engine, and wait until it has answered a test request.

    The engine is the program that serves the model. The command first runs the unfinished steps of `deploy up`, which
    prepare the nodes. Then it starts Ray (the program that connects the nodes) and the engine. If the engine already runs or
    loads the model, the command only waits for the answer. Ctrl-C does not stop the engine; `deploy down` stops it.

    \b
    # Prepare the nodes, and start the engine.
    deploy serve
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
        f"READY  {served.engine.answer['model']} on {head.name}, at 127.0.0.1:{port} of this node",
        f"       deploy tunnel                          # http://127.0.0.1:{port} on this machine",
        f"       {curl_line(key, port)}",
    ]
    context.console.result(document, "\n".join(lines))


def curl_line(key: Path, port: int) -> str:
    """A shell command that lists the served models. The key goes through a pipe, since every user can read argument lists."""
    header = f'printf "Authorization: Bearer %s" "$(cat {shlex.quote(str(key))})"'  # printf is a shell builtin
    return f"{header} | curl -H @- http://127.0.0.1:{port}/v1/models"


@click.command()
@click.option("--keep-ray", is_flag=True, help="Stop only the engine. Ray continues to run.")
@no_wait_option
@reporting
def down(context: DeployContext, keep_ray: bool, no_wait: bool) -> None:
    """Stop the engine and Ray on all nodes, and check that no process is left.

    The engine is the program that serves the model. Ray is the program that connects the nodes. The command also stops
    running builds, downloads and tunnels, and removes the copies of keys from the nodes. It skips nodes that it cannot
    reach, and lists them at the end.

    \b
    # Stop everything.
    deploy down
    """
    with held(context, no_wait=no_wait) as keeper:
        try:
            ended = at_work(context, keeper, lambda work: order.down(work, keep_ray=keep_ray))
        finally:
            tunnels.end_all(context.deployment.folder)  # also if a node cannot be reached
    what = "the engine is stopped, and Ray is still running" if keep_ray else "no process of this deployment is running"
    text = ", ".join(f"{count} on {node}" for node, count in ended.items() if count)
    context.console.result(
        {"ended": ended}, f"{what}" + (f"; processes stopped: {text}" if text else "; none was running before")
    )


@click.command()
@click.option(
    "--share",
    is_flag=True,
    help="Also remove the Python environments of this deployment in the folder that all nodes share.",
)
@click.option(
    "--weights",
    is_flag=True,
    help="Also remove the files of the model. Other deployments on these nodes may use the same files.",
)
@click.option(
    "--cache",
    is_flag=True,
    help="Also remove the cache of the shared folder from the nodes' disks. Other deployments on these nodes may use this "
    "cache.",
)
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@no_wait_option
@reporting
def purge(context: DeployContext, share: bool, weights: bool, cache: bool, yes: bool, no_wait: bool) -> None:
    """Stop the engine and Ray as `deploy down` does, and remove files from the nodes.

    The command removes logs, keys, files of Ray, and the program uv. Without --weights, the model stays. Without
    --share, the Python environments stay. The folder .deploy on this machine stays. The command asks for confirmation.

    `deploy up` has a step named 'cache', which caches files of the shared folder on the nodes' disks. Without --cache, these
    cached files stay, and the end of the output names the nodes with a cache. With --cache, the command removes what the
    step has added: the option fsc in /etc/fstab, the copy of the old /etc/fstab, and the package cachefilesd with its files.

    \b
    # Remove the files, including the Python environments.
    deploy purge --share
    # Remove everything that deploy has put on the nodes.
    deploy purge --share --weights --cache
    """
    console, deployment = context.console, context.deployment
    what = ["jobs, logs, secrets and uv"] + (["environments"] if share else []) + (["the model's files"] if weights else [])
    what += ["the cache of the shared folder"] if cache else []
    question = f"Remove {', '.join(what)} from {len(deployment.nodes)} nodes?"
    if not yes and not (console.interactive and click.confirm(question, err=True)):
        raise UsageError(
            "nothing was removed, because the removal was not confirmed", remedy="to remove without asking, use --yes"
        )

    async def go(work: Work) -> Removed:
        await order.down(work)
        return await remains.purge(work, share=share, weights=weights, cache=cache)

    with held(context, no_wait=no_wait) as keeper:
        try:
            removed = at_work(context, keeper, go)
        finally:
            tunnels.end_all(deployment.folder)
        undone = cache and not removed.failed
        cached = [] if undone else [node for node, on in keeper.state.data("cache").get("fsc", {}).items() if on]
        # Without these records, a later `purge` would not find the model's files, or not name the nodes with a cache.
        kept = {"cache"} if cached else set()
        kept |= set() if weights and not removed.failed else {"weights"}
        keeper.forget(*(name for name in keeper.state.steps if name not in kept))
    lines = [*removed.places, f"{removed.bytes / 1e9:.2f} GB removed"]
    if cached and not cache:
        lines.append(f"the cache of the shared folder is kept on {', '.join(cached)}; `deploy purge --cache` removes it")
    console.result({"removed": removed.places, "bytes": removed.bytes, "cached": cached}, "\n".join(lines))
    if removed.failed:
        raise combined_error(removed.failed, len(deployment.nodes))


@click.command("preflight")
@reporting
def preflight_command(context: DeployContext) -> None:
    """Check all nodes and the network between them.

    Nodes are the machines in deploy.toml. The command shows each check with its result, and how to fix each problem. It
    changes nothing on the nodes.

    \b
    # Run all checks.
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
