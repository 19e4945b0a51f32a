"""Finds and stops our processes on the nodes. They are identified by marks in their environment, not by names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from deploy.fleet.calls import RemoteNode, call
from deploy.fleet.results import combined_error, on_all, try_all
from deploy.remote.wire import Json
from gracefarm.errors import GracefarmError, NodeError

NO_MARK = "-"
"A `prefix` for deploy.remote.look that no mark has, so that no processes are listed."
PLAN_MARK = "GRACEFARM_PLAN"
"Variable of every process with the plan and environment for which it was started (deploy.planning.plans.plan_mark)."


async def find(targets: Sequence[RemoteNode], mark: str, wanted: Mapping[str, Sequence[int]]) -> dict[str, Json]:
    """Find our processes on each node, and the processes that use the wanted ports."""
    return await on_all(
        targets,
        lambda node: call(node, "look.look", {"prefix": f"{mark}/{node.name}/", "ports": list(wanted.get(node.name, ()))}),
    )


def of_job(seen: Json, job: str) -> list[Json]:
    """The processes of a job on a node."""
    return [process for process in seen["processes"] if process["mark"].rpartition("/")[2] == job]


def stop_hint(who: str, otherwise: str) -> str:
    """How to stop a process that deploy.remote.network.holder named. `otherwise`: if it belongs to no deployment."""
    match = re.search(r"\(process \d+ of deployment (\w+)\)", who)
    if match is None:
        return otherwise
    return f"run `deploy down` in the folder with the deploy.toml of that deployment (its file .deploy/id contains {match[1]})"


def raylet(seen: Json, plan_mark: str | None = None) -> bool:
    """Whether our raylet runs on a node; with `plan_mark`: and was started for this plan and environment."""
    raylets = [process for process in seen["processes"] if process["name"] == "raylet"]
    return bool(raylets) and all(plan_mark in (None, process["plan"]) for process in raylets)


async def try_stop(
    targets: Sequence[RemoteNode], mark: str, *, jobs: Sequence[str] = ("",), grace: float = 10
) -> tuple[dict[str, int], dict[str, GracefarmError]]:
    """Stop our processes and check that none is left. `jobs`: prefixes of the jobs' names.

    Returns:
        Number of stopped processes by node, and errors by node.
    """

    async def end(node: RemoteNode) -> int:
        answer = await call(node, "marked.stop", {"prefixes": [f"{mark}/{node.name}/{job}" for job in jobs], "grace": grace})
        if answer["left"]:
            pids = ", ".join(str(process["pid"]) for process in answer["left"])
            raise NodeError(
                f"{node.name}: these processes cannot be stopped: {pids}",
                remedy="stop these processes as root or as the user who owns them, then repeat `deploy down`",
            )
        return int(answer["ended"])

    return await try_all(targets, end)


async def stop(targets: Sequence[RemoteNode], mark: str, *, jobs: Sequence[str] = ("",), grace: float = 10) -> dict[str, int]:
    """Stop our processes and check that none is left. `jobs`: prefixes of the jobs' names.

    Returns:
        Number of stopped processes by node.

    Raises:
        NodeError, SshError: after all other nodes are done: a process could not be stopped, or a node was not reached.
    """
    ended, failed = await try_stop(targets, mark, jobs=jobs, grace=grace)
    if failed:
        raise combined_error(failed, len(targets))
    return ended
