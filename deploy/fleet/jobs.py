"""Detached jobs: commands that outlive the connection, known to a node by their names and marks."""

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
    """A detached job, as looked at on its node. `lost`: killed, or the node started again."""

    state: JobState
    pid: int | None = None
    returncode: int | None = None
    size: int = 0
    "Bytes of its log."


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
    """Start a command that outlives the connection; False: a job of this name runs already, and was left alone.

    It gets a session of its own, its output goes to a log in the node's folder, `env` and `input` by stdin.
    Raises:
        NodeError, SshError: it could not be started.
    """
    data = env_block(env or {}) + (input or b"")
    result = await _ask(fleet, "start", node, name, command_line(command), await fleet.base(node), data=data)
    require({node.name: result}, f"starting {name}")
    return result.stdout.startswith("started")


async def job_status(fleet: Fleet, node: Node, name: str) -> JobStatus:
    """Look at a job. Raises NodeError, SshError."""
    result = await _ask(fleet, "status", node, name)
    require({node.name: result}, f"looking at {name}")
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
    """Hand on each line of its log, from byte `offset`, until it ends; goes on after a cut without loss or repetition.

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
                    remedy=f"look there: `deploy ssh {node.name}`",
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
        error = SshError(f"{node}: the connection was cut", remedy="the job goes on; repeat the command")
    return CommandResult(node=node, returncode=code, stderr=running.err.decode(errors="replace"), error=error)


async def stop_job(fleet: Fleet, node: Node, name: str, *, grace: float = 10.0) -> None:
    """TERM to every process of the job, KILL after `grace` seconds, and a look that none is left; absent is fine.

    Raises:
        NodeError: processes are left (another user's); SshError: not reached.
    """
    result = await _ask(fleet, "stop", node, name, str(int(grace)))
    if result.returncode == 1 and result.stdout.strip():
        raise NodeError(
            f"{node}: processes of {name} cannot be ended: {result.stdout.strip()}", remedy="end them as their owner"
        )
    require({node.name: result}, f"stopping {name}")
