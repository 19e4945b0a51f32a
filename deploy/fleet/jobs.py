"""Detached jobs: commands that continue without the connection. They are found on a node by their names and marks.

On the node, deploy/data/jobs.sh does the work.
"""

from __future__ import annotations

import asyncio
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

import asyncssh

from deploy.fleet.commands import LineSplitter, RunningCommand, command_line, env_block
from deploy.fleet.connections import explain
from deploy.fleet.results import CommandResult, require
from deploy.fleet.ssh import Fleet
from deploy.nodes.deployment import Node
from gracefarm.errors import GracefarmError, NodeError, SshError

JobState = Literal["absent", "running", "exited", "stopped", "lost"]


@dataclass(frozen=True, kw_only=True)
class JobStatus:
    """The state of a detached job on its node. `lost`: it was killed, or the node was rebooted."""

    state: JobState
    pid: int | None = None
    returncode: int | None = None
    size: int = 0
    "Size of its log in bytes."


@cache
def _script() -> str:
    return (resources.files("deploy") / "data" / "jobs.sh").read_text()


async def _command(fleet: Fleet, verb: str, node: Node, name: str, *more: str) -> list[str]:
    folder = f"{await fleet.folder(node)}/jobs/{name}"
    return ["sh", "-c", _script(), "gracefarm-jobs", verb, folder, f"{fleet.mark}/{node.name}/{name}", *more]


async def _ask(fleet: Fleet, verb: str, node: Node, name: str, *more: str, data: bytes = b"") -> CommandResult:
    command = await _command(fleet, verb, node, name, *more)
    return (await fleet.run(command, nodes=[node], input=data))[node.name]


async def start_job(
    fleet: Fleet,
    node: Node,
    name: str,
    command: Sequence[str] | str,
    env: Mapping[str, str] | None = None,
    input: bytes | None = None,  # noqa: A002
) -> bool:
    """Start a command that continues without the connection. Return False if a job of this name is already running.

    The command runs in a new session, and its output goes to a log in the node's folder. `env` and `input` are sent on stdin.

    Raises:
        NodeError, SshError: it could not be started.
    """
    data = env_block(env or {}) + (input or b"")
    result = await _ask(fleet, "start", node, name, command_line(command), await fleet.base(node), data=data)
    require({node.name: result}, f"starting {name}")
    return result.stdout.startswith("started")


async def job_status(fleet: Fleet, node: Node, name: str) -> JobStatus:
    """The status of a job. Raises NodeError, SshError."""
    result = await _ask(fleet, "status", node, name)
    require({node.name: result}, f"reading the status of {name}")
    words = result.stdout.split()
    state: Any = words[0]
    number = int(words[1]) if words[1] != "-" else None
    return JobStatus(
        state=state,
        pid=number if state == "running" else None,
        returncode=number if state == "exited" else None,
        size=int(words[2]),
    )


async def follow_job(
    fleet: Fleet, node: Node, name: str, on_line: Callable[[str], None], *, offset: int = 0, patience: float = 300.0
) -> JobStatus:
    """Call `on_line` with each line of a job's log, from byte `offset`, until the job ends.

    After a lost connection it continues without losing or repeating a line.

    Raises:
        SshError, NodeError: the node could not be reached for `patience` seconds.
    """
    since = time.monotonic()
    log = LineSplitter(on_line)
    while True:
        before = log.size
        try:
            result = await _follow(fleet, node, name, offset, log)
            if result.ok:
                status = await job_status(fleet, node, name)
                if status.state != "running":
                    log.end()
                    return status
            problem: GracefarmError | None = result.error
            if problem is None and not result.ok:
                problem = NodeError(
                    f"{node}: the log of {name} cannot be read: {result.stderr.strip() or result.returncode}",
                    remedy=f"open a shell on the node with `deploy ssh {node.name}`, and fix this error",
                )
        except GracefarmError as error:
            problem = error
        if log.size > before or problem is None:
            since = time.monotonic()
        if problem and time.monotonic() - since > patience:
            raise problem
        await asyncio.sleep(0.5)


async def _follow(fleet: Fleet, node: Node, name: str, offset: int, log: LineSplitter) -> CommandResult:
    command = await _command(fleet, "follow", node, name, str(offset + log.size))
    running = RunningCommand(node, None, log.feed)
    code: int | None = None
    error: GracefarmError | None = None
    try:
        code = await fleet.attend(node, shlex.join(command), running)
    except (OSError, asyncssh.Error) as lost:
        error = explain(node, lost)
    if code is None and error is None:
        error = SshError(f"{node}: the connection was lost", remedy="repeat the command; the job is still running")
    return CommandResult(node=node, returncode=code, stderr=running.err.decode(errors="replace"), error=error)


async def stop_job(fleet: Fleet, node: Node, name: str, *, grace: float = 10.0) -> None:
    """Send TERM to every process of the job, KILL after `grace` seconds, and check that all have ended.

    It is not an error if there is no such job.

    Raises:
        NodeError: some processes still run, for example those of another user.
        SshError: the node cannot be reached.
    """
    result = await _ask(fleet, "stop", node, name, str(int(grace)))
    if result.returncode == 1 and result.stdout.strip():
        raise NodeError(
            f"{node}: these processes of {name} cannot be stopped: {result.stdout.strip()}",
            remedy="stop these processes as root or as the user who owns them, then repeat the command",
        )
    require({node.name: result}, f"stopping {name}")
