"""Our processes on the nodes, seen and ended: known by the marks in their environment, not by names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from deploy.fleet.calls import RemoteNode, call
from deploy.fleet.results import combined_error, on_all, try_all
from deploy.remote.wire import Json
from gracefarm.errors import GracefarmError, NodeError

NO_MARK = "-"
"As `prefix` of deploy.remote.look: no mark begins so, so that no process is looked for."
PLAN_MARK = "GRACEFARM_PLAN"
"In the environment of every process: with which plan and environment it was started (deploy.planning.plans.plan_mark)."


async def find(targets: Sequence[RemoteNode], mark: str, wanted: Mapping[str, Sequence[int]]) -> dict[str, Json]:
    """Our processes on each node, and who holds the ports that are wanted there."""
    return await on_all(
        targets,
        lambda node: call(node, "look.look", {"prefix": f"{mark}/{node.name}/", "ports": list(wanted.get(node.name, ()))}),
    )


def of_job(seen: Json, job: str) -> list[Json]:
    """Processes of a job there."""
    return [process for process in seen["processes"] if process["mark"].rpartition("/")[2] == job]


def raylet(seen: Json, plan_mark: str | None = None) -> bool:
    """A raylet of ours runs there; `plan_mark`: started with this very plan and environment."""
    raylets = [process for process in seen["processes"] if process["name"] == "raylet"]
    return bool(raylets) and all(plan_mark in (None, process["plan"]) for process in raylets)


async def try_stop(
    targets: Sequence[RemoteNode], mark: str, *, jobs: Sequence[str] = ("",), grace: float = 10
) -> tuple[dict[str, int], dict[str, GracefarmError]]:
    """End our processes and look that none is left: node to how many were ended; node to why not. `jobs`: as names begin."""

    async def end(node: RemoteNode) -> int:
        answer = await call(node, "marked.stop", {"prefixes": [f"{mark}/{node.name}/{job}" for job in jobs], "grace": grace})
        if answer["left"]:
            pids = ", ".join(str(process["pid"]) for process in answer["left"])
            raise NodeError(
                f"{node.name}: processes cannot be ended: {pids}", remedy="end them as their owner, then repeat `deploy down`"
            )
        return int(answer["ended"])

    return await try_all(targets, end)


async def stop(targets: Sequence[RemoteNode], mark: str, *, jobs: Sequence[str] = ("",), grace: float = 10) -> dict[str, int]:
    """End our processes and look that none is left; node to how many were ended. `jobs`: as names begin.

    Raises:
        NodeError: one is left; SshError: a node was not reached. After all others were stopped.
    """
    ended, failed = await try_stop(targets, mark, jobs=jobs, grace=grace)
    if failed:
        raise combined_error(failed, len(targets))
    return ended
