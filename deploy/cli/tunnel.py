"""`deploy tunnel`: forward the engine and Ray's dashboard to this machine."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import click

from deploy.cli.common import DeployContext, reporting
from deploy.fleet import tunnels
from deploy.fleet.ssh import open_fleet
from deploy.nodes.deployment import Folder
from gracefarm.console import counted
from gracefarm.errors import GracefarmError, SshError


def _prepare(folder: Folder) -> None:
    """Create the folder with access only for its owner. Raises ConfigError before `deploy init`."""
    _ = folder.id
    folder.make()


@click.command()
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    help="Port on this machine for the engine. Default: the engine's port on the head (2242).",
)
@click.option(
    "--dashboard-port",
    type=click.IntRange(0, 65535),
    help="Port on this machine for Ray's dashboard. Default: the dashboard's port on the head (8265).",
)
@click.option(
    "--background",
    is_flag=True,
    help="Return at once. The tunnel stays open until `deploy tunnel --end` or `deploy down`.",
)
@click.option("--end", is_flag=True, help="Close all tunnels of this deployment on this machine.")
@reporting
def tunnel(context: DeployContext, port: int | None, dashboard_port: int | None, background: bool, end: bool) -> None:
    """Make the engine and Ray's dashboard available on this machine, until Ctrl-C.

    The engine (the program that serves the model) accepts requests only on the head, the first node. Ray is the program that
    connects the nodes. The tunnel forwards a port of this machine to the head through ssh. The command prints the addresses
    to use. If a port is in use, the command chooses a free port. If the connection is lost, the command connects again.

    \b
    # Open the tunnel until Ctrl-C.
    deploy tunnel
    # Open the tunnel in the background.
    deploy tunnel --background
    """
    deployment = context.deployment
    if end:
        count = tunnels.end_all(deployment.folder)
        context.console.result({"ended": count}, f"{counted(count, 'tunnel')} closed" if count else "no tunnel was open")
        return
    if background:
        _in_background(context, port, dashboard_port)
        return
    wanted = tunnels.ports(deployment, engine=port, dashboard=dashboard_port)
    _prepare(deployment.folder)

    def changed(error: GracefarmError | None) -> None:
        if error is None:
            context.console.event("connected", "reconnected")
        else:
            context.console.warn(f"{error.cause}; trying again")

    async def go() -> None:
        task = asyncio.current_task()
        assert task
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        async with open_fleet(deployment) as fleet, tunnels.opened(fleet, deployment.head, wanted) as forwards:
            _tell(context, {forward.name: asdict(forward) | {"moved": forward.moved} for forward in forwards})
            await tunnels.attend(fleet, deployment.head, changed)

    with tunnels.registered(deployment.folder), suppress(KeyboardInterrupt, asyncio.CancelledError):
        asyncio.run(go())
    context.console.event("closed", "the tunnel is closed; the engine is still running")


def _tell(context: DeployContext, forwards: Mapping[str, dict[str, Any]]) -> None:
    rows = {name: {**forward, "url": f"http://127.0.0.1:{forward['local']}"} for name, forward in forwards.items()}
    lines = []
    for name, forward in rows.items():
        path = "/v1" if name == "engine" else ""
        moved = f"   (local port {forward['requested']} is not available)" if forward["moved"] else ""
        lines.append(f"{name:<10} {forward['url']}{path}{moved}")
    key = context.deployment.folder.api_key
    lines.append(f"key        {key}" if key.exists() else "key        none yet; `deploy serve` creates it")
    context.console.result({"forwards": rows, "api_key_file": str(key)}, "\n".join(lines))


def _in_background(context: DeployContext, port: int | None, dashboard_port: int | None) -> None:
    """Run the same command in a new session and print its first line. Raises SshError if it fails."""
    deployment = context.deployment
    _prepare(deployment.folder)
    argv = [sys.executable, "-m", "deploy", "--file", str(deployment.path), "tunnel", "--json"]
    argv += ["--port", str(port)] if port is not None else []
    argv += ["--dashboard-port", str(dashboard_port)] if dashboard_port is not None else []
    log = deployment.folder.logs / "tunnel.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
    while True:
        first = log.read_text().partition("\n")
        if first[1]:
            message = json.loads(first[0])
            break
        if process.poll() is not None:
            message = {}
            break
        time.sleep(0.05)
    if "forwards" not in message:
        cause = message.get("text") or f"the tunnel failed with exit code {process.returncode}"
        raise SshError(cause, remedy=message.get("remedy", f"see the log {log}"))
    _tell(context, message["forwards"])
