"""Follows the logs of the engine and of Ray on every node. After a lost connection, it continues at the same place."""

from __future__ import annotations

import asyncio
import posixpath
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deploy.engine.log import clean
from deploy.fleet.calls import RemoteNode, call
from deploy.fleet.jobs import JobStatus, follow_job, job_status
from deploy.fleet.results import require
from deploy.fleet.ssh import Fleet
from deploy.nodes import paths
from deploy.nodes.deployment import Deployment, Node
from deploy.nodes.facts import Facts
from deploy.remote.wire import Json
from gracefarm.errors import EngineError, GracefarmError, HostError, NodeError, SshError

OnLogLine = Callable[[str, str, str], None]
"Called with node, log and line."
OnCut = Callable[[str, GracefarmError], None]
"Called with a node and the error when its connection is lost."
PATIENCE = 300.0
"Seconds that a node may be unreachable before following its logs fails."


@dataclass(frozen=True, kw_only=True)
class Wish:
    """How much of the logs to show."""

    lines: int = 50
    "Number of existing lines to show of each log."
    follow: bool = False
    patience: float = PATIENCE
    pause: float = 1.0
    "Seconds between attempts to reconnect."


async def engine_log(fleet: Fleet, head: Node, wish: Wish, on_line: OnLogLine) -> JobStatus:
    """Show the engine's log; with `follow`, until the engine ends.

    Raises:
        EngineError: the engine was never started.
        SshError, NodeError: the head cannot be reached.
    """
    status = await job_status(fleet, head, paths.ENGINE_JOB)
    if status.state == "absent":
        raise EngineError(
            "no engine was started yet",
            remedy="start an engine with `deploy serve`, or show Ray's logs with `deploy logs --ray`",
        )

    def say(line: str) -> None:
        on_line(head.name, "engine", clean(line))

    log = f"{await fleet.folder(head)}/jobs/{paths.ENGINE_JOB}/log"
    before = f"head -c {status.size} {shlex.quote(log)} | tail -n {wish.lines}"
    results = await fleet.run(before, nodes=[head], timeout=120)
    require(results, "reading the engine's log")
    content = results[head.name].raw
    if not wish.follow:
        for line in content.decode(errors="replace").splitlines():
            say(line)
        return status
    return await follow_job(fleet, head, paths.ENGINE_JOB, say, offset=status.size - len(content), patience=wish.patience)


async def ray_logs(
    deployment: Deployment, facts: Facts, node: RemoteNode, wish: Wish, on_line: OnLogLine, on_cut: OnCut
) -> int:
    """Show Ray's logs of the last session on one node, and return the number of files. With `follow`, it does not end.

    Raises:
        SshError, HostError: the node cannot be reached; with `follow`, for more than `wish.patience` seconds.
    """
    wanted = [{"name": "", "pattern": pattern} for pattern in patterns(deployment, facts, node.name)]
    offsets: dict[str, int] = {}
    seen, cut = time.monotonic(), False

    def heard(event: Json) -> None:
        nonlocal seen, cut
        seen, cut = time.monotonic(), False
        if event["event"] == "lines":
            offsets[event["path"]] = event["offset"]
            for line in event["lines"]:
                on_line(node.name, event["name"], clean(line))

    while True:
        request = {"patterns": wanted, "lines": wish.lines, "follow": wish.follow, "offsets": offsets}
        try:
            answer = await call(node, "watch.tail", request, on_event=heard)
        except (SshError, NodeError, HostError) as error:
            if not wish.follow or time.monotonic() - seen > wish.patience:
                raise
            if not cut:
                on_cut(node.name, error)
            cut = True
        else:
            if not wish.follow:
                return len(answer["offsets"])
        await asyncio.sleep(wish.pause)


def patterns(deployment: Deployment, facts: Facts, name: str) -> Sequence[str]:
    """Patterns of Ray's logs on a node: in its own folder, and in the path of the head, which workers before Ray 2.5x use."""
    users = {node.name: node.user for node in facts.nodes}
    nodes = (deployment.node(name), deployment.head)
    folders = dict.fromkeys(paths.ray_temp(deployment, node, users[node.name]) for node in nodes if node.name in users)
    ends = ("*.out", "*.err", "*.log")
    return [posixpath.join(folder, "session_latest", "logs", end) for folder in folders for end in ends]
