"""`deploy status`, `top`, `logs` and `collect`: the state of a deployment. These commands change nothing and take no lock."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import suppress
from pathlib import Path

import click
import rich.console
from rich.console import Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from deploy.cli.common import DeployContext, nodes_option, output, reporting
from deploy.cli.nodes import COLOURS
from deploy.fleet.jobs import JobStatus
from deploy.fleet.shells import remote_nodes
from deploy.fleet.ssh import open_fleet
from deploy.nodes import redact
from deploy.nodes.deployment import Node
from deploy.nodes.facts import load_facts
from deploy.watch.collect import Bundle, as_json, write_bundle
from deploy.watch.logs import Wish, engine_log, ray_logs
from deploy.watch.status import SERVING, WAITING, NodeStatus, Service, Status, look, watch_of
from deploy.watch.top import Moment, watching
from gracefarm.errors import EngineError, ExitCode, GracefarmError, SeveralError

_COLOUR = {"READY": "bold green", "BUSY": "green", "LOADING": "cyan", "PLANNED": "dim", "STOPPED": "dim", "DEGRADED": "yellow"}
_BAD = "bold red"


# status


@click.command()
@click.option(
    "--canary",
    default=30.0,
    show_default=True,
    type=click.FloatRange(min=0.1),
    help="Maximum number of seconds to wait for the answer to the test request.",
)
@reporting
def status(context: DeployContext, canary: float) -> None:
    """Show the state of the nodes and of the engine.

    The engine is the program that serves the model. Ray is the program that connects the nodes. The command sends a test
    request to the engine, and waits for one token. The first word of the output is the state of the engine. The exit code
    depends on this state:

    \b
    STATE         EXIT CODE  MEANING
    READY         0          the engine answers
    BUSY          0          the engine answers other requests
    PLANNED       65         nothing was started yet
    LOADING       65         the engine is being prepared, or loads the model
    STOPPED       65         the engine is not running
    DEGRADED      63         the engine answers, but Ray has lost a node
    WEDGED        63         the engine accepts requests but generates no tokens
    DEAD(engine)  63         the engine has ended, or it answers with errors
    DEAD(node)    63         a node is lost
    FAILED(step)  63         a step failed, such as the start of the engine
    UNREACHABLE   60         no ssh connection to the head (the first node)

    \b
    # Show the state.
    deploy status
    """

    async def go() -> Status:
        async with open_fleet(context.deployment) as fleet:
            return await look(watch_of(context.deployment, fleet), canary=canary)

    seen = asyncio.run(go())
    if context.console.as_json:
        context.console.result(seen.model_dump())
    else:
        output().print(render(seen))
    sys.exit(code_of(seen.service))


def code_of(service: Service) -> ExitCode:
    """The exit code of `deploy status`."""
    if service.word in SERVING:
        return ExitCode.OK
    if service.word in WAITING:
        return ExitCode.NOT_SERVING
    return ExitCode.SSH if service.word == "UNREACHABLE" else ExitCode.ENGINE


def render(seen: Status, moment: Moment | None = None) -> RenderableType:
    """The status as text."""
    service = seen.service
    colour = _COLOUR.get(service.word, _BAD)
    model = f"{seen.model}{', ' + seen.layout if seen.layout else ''}"
    lines = [f"[{colour}]{escape(service.label)}[/]  {escape(model)}", f"  {escape(service.text)}"]
    lines += [f"  [{_BAD}]{escape(note)}[/]" for note in seen.notes]
    if service.remedy:
        lines.append(f"  [bold]remedy:[/] {escape(service.remedy)}")
    if moment:
        lines.append(f"  {escape(speed_of(moment))}")
    if seen.usd_per_hour is not None:
        lines.append(f"  ${seen.usd_per_hour:.2f}/h, ${seen.usd_since_boot:.2f} since the nodes were booted")
    return Group(*lines, "", _nodes(seen.nodes))


def _nodes(nodes: Sequence[NodeStatus]) -> Table:
    heads = ("node", "address", "Ray", "jobs", "GPU memory", "busy", "°C", "host memory", "disk free", "load", "up")
    table = Table(*heads, box=None, pad_edge=False)
    for node in nodes:
        if node.error:
            table.add_row(node.name, node.address, f"[{_BAD}]{escape(node.error)}[/]")
            continue
        ray = {True: "[green]alive[/]", False: f"[{_BAD}]lost[/]", None: "runs" if node.raylet else "[dim]-[/]"}[node.ray]
        table.add_row(
            node.name,
            node.address,
            ray,
            " ".join(node.jobs) or "[dim]-[/]",
            "\n".join(_gpu_memory(gpu.used_mib, gpu.total_mib) for gpu in node.gpus) or f"[dim]{escape(node.gpu_error)}[/]",
            "\n".join(_number(gpu.busy, " %") for gpu in node.gpus),
            "\n".join(_number(gpu.celsius, "") for gpu in node.gpus),
            f"{(node.memory.total - node.memory.available) / (1 << 30):.0f} of {node.memory.total / (1 << 30):.0f} GiB"
            if node.memory
            else "",
            "\n".join(
                [f"{disk.free / 1e9:.0f} GB {escape(disk.path)}" for disk in node.disks]
                + [f"[{_BAD}]no answer {escape(path)}[/]" for path in node.stuck]
            ),
            f"{node.load:.1f}/{node.cores}",
            f"{node.uptime / 3600:.1f} h",
        )
    return table


def _gpu_memory(used: float | None, total: float | None) -> str:
    return f"{used / 1024:.1f} of {total / 1024:.1f} GiB" if used is not None and total else "?"


def _number(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:.0f}{unit}"


# top


def speed_of(moment: Moment) -> str:
    """The engine's counters in one line."""
    if moment.metrics is None:
        return "no metrics: the engine does not listen"
    rate = f"{moment.tokens_per_s:.1f} tokens/s" if moment.tokens_per_s is not None else "tokens/s: measuring"
    parts = [rate]
    if moment.metrics.num_requests_running is not None:
        parts.append(
            f"{moment.metrics.num_requests_running:.0f} running, {moment.metrics.num_requests_waiting or 0:.0f} waiting"
        )
    if moment.first_s is not None:
        parts.append(f"first token after {moment.first_s:.2f} s")
    if moment.metrics.cache is not None:
        parts.append(f"KV cache {moment.metrics.cache:.0%}")
    if moment.metrics.generation_tokens_total is not None:
        parts.append(f"{moment.metrics.generation_tokens_total:,.0f} tokens since the engine's start")
    if moment.usd_per_mtok is not None:
        parts.append(f"${moment.usd_per_mtok:,.2f}/Mtok")
    return "; ".join(parts)


@click.command()
@click.option(
    "--every",
    default=2.0,
    show_default=True,
    type=click.FloatRange(min=0.2),
    help="Seconds between two updates of the screen.",
)
@click.option(
    "--canary-every",
    default=30.0,
    show_default=True,
    type=click.FloatRange(min=1),
    help="Seconds between two test requests.",
)
@click.option("--count", type=click.IntRange(1), help="Stop after this many updates. Default: run until Ctrl-C.")
@reporting
def top(context: DeployContext, every: float, canary_every: float, count: int | None) -> None:
    """Show the state live, with tokens/s and cost, until Ctrl-C.

    Every 2 seconds by default, the command shows the counters of the engine (the program that serves the model), and the
    GPUs and disks of the nodes. Every 30 seconds by default, the command also sends a test request for one token to the
    engine.

    \b
    # Update the screen every 2 seconds.
    deploy top
    # Update the screen every 10 seconds.
    deploy top --every 10
    """
    console = context.console

    async def go() -> None:
        async with open_fleet(context.deployment) as fleet:
            watch = watch_of(context.deployment, fleet)
            moments = watching(watch, every=every, canary_every=canary_every, count=count)
            if console.interactive and sys.stdout.isatty():
                await _live(moments)
                return
            async for moment in moments:
                if console.as_json:
                    console.result({**moment.status.model_dump(), **moment.numbers()})
                else:
                    output().print(time.strftime("%H:%M:%S"), render(moment.status, moment))

    with suppress(KeyboardInterrupt):
        asyncio.run(go())


async def _live(moments: AsyncIterator[Moment]) -> None:
    """Show the moments on the whole terminal. The last one stays on the screen at the end."""
    last: Moment | None = None
    try:
        with Live(console=rich.console.Console(highlight=False), auto_refresh=False, screen=True) as live:
            async for moment in moments:
                last = moment
                end = "[dim]Ctrl-C ends only this view[/]"
                live.update(Group(render(moment.status, moment), "", end), refresh=True)
    finally:
        if last:
            output().print(render(last.status, last))


# logs


@click.command()
@click.argument("names", nargs=-1, metavar="[NODE]…")
@nodes_option
@click.option(
    "-f",
    "--follow",
    is_flag=True,
    help="Also show new lines. The command ends with Ctrl-C, or when the engine ends. If the connection is lost, the "
    "command connects again.",
)
@click.option(
    "--ray", "only_ray", is_flag=True, help="Show only the logs of Ray. Without NODE, show the logs of Ray on all nodes."
)
@click.option(
    "-n", "--lines", default=50, show_default=True, type=click.IntRange(0), help="Show the last N lines of each log."
)
@reporting
def logs(
    context: DeployContext, names: tuple[str, ...], words: tuple[str, ...], follow: bool, only_ray: bool, lines: int
) -> None:
    """Show the logs of the engine and of Ray.

    The engine is the program that serves the model. Ray is the program that connects the nodes. Without NODE, the command
    shows the log of the engine. With NODE, such as k3, it shows the logs of Ray on this node. For the head (the first node),
    it shows the log of the engine too. API keys and access tokens are hidden in the output.

    \b
    # Show the last lines of the engine's log, then follow the log.
    deploy logs -f
    # Show the logs of Ray on all nodes.
    deploy logs --ray
    # Show the logs of Ray on the node k3.
    deploy logs k3
    """
    deployment = context.deployment
    chosen = [name for word in (*names, *words) for name in word.split(",") if name]
    nodes = deployment.select(chosen) if chosen else deployment.nodes
    ray = bool(chosen) or only_ray
    engine = deployment.head in nodes and not only_ray
    show = _Shower(context, nodes)
    wish = Wish(lines=lines, follow=follow)

    async def go() -> None:
        async with open_fleet(deployment) as fleet:
            tasks = []
            if ray:
                facts = load_facts(deployment)
                tasks += [
                    asyncio.create_task(_ray(ray_logs(deployment, facts, node, wish, show.line, show.cut), node.name, show))
                    for node in remote_nodes(fleet, facts, nodes)
                ]
            if engine:
                reading = engine_log(fleet, deployment.head, wish, show.line)
                tasks.append(asyncio.create_task(_engine(reading, show, only_engine=not ray)))
            await _all(tasks)

    with suppress(KeyboardInterrupt):
        asyncio.run(go())


class _Shower:
    """Prints redacted lines with the name of their node."""

    def __init__(self, context: DeployContext, nodes: Sequence[Node]) -> None:
        self.context = context
        self.ranks = {node.name: node.rank for node in nodes}
        self.width = max(len(node.name) for node in nodes)
        self.redactor = redact.of(context.deployment.folder)
        self.out = rich.console.Console(highlight=False, soft_wrap=True)

    def line(self, node: str, log: str, text: str) -> None:
        """Print one line of a log."""
        clean = self.redactor.line(text)
        if self.context.console.as_json:
            self.context.console.event("line", clean, node=node, log=log)
            return
        colour = COLOURS[self.ranks.get(node, 0) % len(COLOURS)]
        self.out.print(f"[{colour}]{escape(node):>{self.width}}[/] [dim]{escape(log)}[/] {escape(clean)}")

    def cut(self, node: str, error: GracefarmError) -> None:
        """Report a lost connection."""
        self.context.console.warn(f"{node}: {error.cause}; trying again")


async def _ray(reading: Awaitable[int], name: str, show: _Shower) -> None:
    if not await reading:
        show.context.console.warn(f"{name}: Ray has no logs on this node")


async def _engine(reading: Awaitable[JobStatus], show: _Shower, *, only_engine: bool) -> None:
    """`only_engine`: only the engine was requested, so a missing engine is an error."""
    try:
        status = await reading
    except EngineError as error:
        if only_engine:
            raise
        show.context.console.warn(error.cause)
        return
    if status.state != "running":
        code = f", exit code {status.returncode}" if status.returncode is not None else ""
        show.context.console.event("ended", f"the engine has ended ({status.state}{code})")


async def _all(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Wait for the end of all logs, then raise their errors."""
    try:
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    finally:
        for task in tasks:
            task.cancel()
    errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    if len(errors) > 1 and all(isinstance(error, GracefarmError) for error in errors):
        raise SeveralError("; ".join(str(error) for error in errors), remedy="check the nodes with `deploy status`")
    if errors:
        raise errors[0]


# collect


@click.command()
@click.option(
    "--into",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    default=".",
    help="Folder to write the archive to. Default: the working directory.",
)
@reporting
def collect(context: DeployContext, into: Path) -> None:
    """Collect all logs in one archive, without secrets.

    The archive also contains the plan, the state and the facts of the nodes. API keys and access tokens are hidden in all
    files. If something failed, summary.md in the archive starts with the first cause. If the command cannot reach a node,
    the archive says so, and contains the files of the other nodes.

    \b
    # Write the archive into /tmp.
    deploy collect --into /tmp
    """
    deployment, folder = context.deployment, into.absolute()

    async def go() -> Bundle:
        async with open_fleet(deployment) as fleet:
            return await write_bundle(deployment, fleet, folder)

    context.console.step("collect", f"collecting logs of {len(deployment.nodes)} nodes")
    bundle = asyncio.run(go())
    for node, why in bundle.missing.items():
        context.console.warn(f"the archive does not have all files of {node}: {why}")
    first = bundle.findings[0] if bundle.findings else None
    lines = [f"{bundle.status.service.label}  {bundle.status.service.text}"]
    lines.append(f"first cause  {first.text}" if first else "first cause  none found")
    if first and first.remedy:
        lines.append(f"remedy       {first.remedy}")
    lines.append(f"archive      {bundle.path}  ({bundle.files} files, {bundle.size / 1e6:.1f} MB, redacted)")
    context.console.result(as_json(bundle), "\n".join(lines))
