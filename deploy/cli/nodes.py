"""`deploy run` and `deploy ssh`. They replace these functions of the tutorial:

run_ip ADDRESS CMD      deploy run -k ADDRESS -- CMD
run_k K CMD             deploy run -k K -- CMD
runhead CMD             deploy run -k head -- CMD
runrest CMD             deploy run -k rest -- CMD
runall CMD              deploy run -- CMD
ssh_k K                 deploy ssh K
killall                 deploy down
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from pathlib import Path

import click
import rich.console
from rich.markup import escape

from deploy.cli.common import DeployContext, nodes_option, reporting
from deploy.fleet.connections import parse_jump
from deploy.fleet.results import CommandResult
from deploy.fleet.ssh import open_fleet
from deploy.nodes.deployment import Deployment, Node
from gracefarm.errors import HostError, NodeError

COLOURS = ("cyan", "green", "yellow", "magenta", "blue", "red")


@click.command(context_settings={"ignore_unknown_options": True})
@nodes_option
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    help="Stop the command after this many seconds. Default: no limit.",
)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@reporting
def run(context: DeployContext, words: tuple[str, ...], timeout: float | None, command: tuple[str, ...]) -> None:
    """Run a command on all or some nodes in parallel.

    Nodes are the machines in deploy.toml. Without -k, COMMAND runs on all nodes. If COMMAND is one word, the shell of each
    node runs it. If COMMAND has several words, the nodes run it without a shell. Write -- before COMMAND. Each line of the
    output starts with the name of the node. The exit code is 0 if COMMAND returned 0 on all chosen nodes.

    \b
    # List the GPUs of all nodes.
    deploy run -- nvidia-smi -L
    # Run a shell command on the head and on the nodes 2 to 5.
    deploy run -k head,2-5 -- 'df -h | grep share'
    """
    deployment = context.deployment
    nodes = deployment.select([part for word in words for part in word.split(",") if part]) if words else deployment.nodes
    width = max(len(node.name) for node in nodes)
    out = rich.console.Console(highlight=False, soft_wrap=True)
    err = rich.console.Console(stderr=True, highlight=False, soft_wrap=True)

    def line(node: Node, stream: str, text: str) -> None:
        if context.console.as_json:
            context.console.event("line", text, node=node.name, stream=stream)
            return
        colour = COLOURS[node.rank % len(COLOURS)]
        (out if stream == "stdout" else err).print(f"[{colour}]{escape(node.name):>{width}}[/] {escape(text)}")

    async def go() -> dict[str, CommandResult]:
        async with open_fleet(deployment) as fleet:
            text = command[0] if len(command) == 1 else list(command)
            return await fleet.run(text, nodes=nodes, timeout=timeout, on_line=line, keep=False)

    results = asyncio.run(go())
    if context.console.as_json:
        rows = {
            name: {
                "returncode": result.returncode,
                "error": result.error.cause if result.error else None,
                "seconds": round(result.seconds, 3),
            }
            for name, result in results.items()
        }
        context.console.result(rows)
    _matrix(results)


def _matrix(results: dict[str, CommandResult]) -> None:
    """Raise NodeError with the exit codes of all nodes, unless all are 0."""
    bad = [result for result in results.values() if not result.ok]
    if not bad:
        return
    good = [name for name, result in results.items() if result.ok]
    parts = [result.error.cause if result.error else f"exit code {result.returncode} on {result.node.name}" for result in bad]
    first = next((result.error for result in bad if result.error), None)
    kind = type(first) if first else NodeError
    rest = f"; 0 on {', '.join(good)}" if good else ""
    raise kind("; ".join(parts) + rest, remedy=first.remedy if first else "fix the error that the command printed above")


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("node")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@reporting
def ssh(context: DeployContext, node: str, command: tuple[str, ...]) -> None:
    """Open an ssh session on a node.

    NODE is the name of a node (k3), its number, its address, or head (the first node). The command uses the user, key
    and jump host in deploy.toml, and refuses a node with an unknown host key. With COMMAND, ssh runs COMMAND instead of
    a shell.

    \b
    # Open a shell on the head.
    deploy ssh head
    # Run a command on the node k3.
    deploy ssh k3 -- nvidia-smi
    """
    deployment = context.deployment
    program = shutil.which("ssh")
    if program is None:
        raise HostError("ssh is missing on this machine", remedy="install openssh-client, or use `deploy run`")
    argv = [program, *arguments(deployment, deployment.node(node)), *command]
    sys.stdout.flush()
    os.execv(argv[0], argv)  # noqa: S606 - replaces this process by ssh


def arguments(deployment: Deployment, node: Node) -> list[str]:
    """Arguments of ssh up to the host."""
    known = deployment.folder.known_hosts
    options = ["-o", f"UserKnownHostsFile={known}", "-o", "GlobalKnownHostsFile=/dev/null", "-o", "StrictHostKeyChecking=yes"]
    access = [*(["-i", str(node.key)] if node.key else [])]
    if node.port != 22:
        options += ["-p", str(node.port)]
    if node.jump:
        user, host, port = parse_jump(node.jump)
        own = Path.home() / ".ssh" / "known_hosts"
        inner = ["ssh", "-o", f'UserKnownHostsFile="{known} {own}"', "-o", "StrictHostKeyChecking=yes", *access]
        inner += ["-p", str(port), "-W", "[%h]:%p", f"{user}@{host}" if user else host]
        options += ["-o", f"ProxyCommand={' '.join(inner)}"]
    return [*options, *access, f"{node.user}@{node.address}" if node.user else node.address]
