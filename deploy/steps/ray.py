"""Starts Ray with the plan's commands and environments: the head first, then workers in waves. Ray confirms the result.

Ray does not supervise the processes that `ray start` leaves (ray#2587), so this module checks the nodes themselves. It
identifies processes by the mark and the plan's id in their environment, never by their names.
"""

from __future__ import annotations

import asyncio
import secrets
import shlex
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from deploy.fleet.calls import RemoteNode, call
from deploy.fleet.files import put_file
from deploy.fleet.jobs import follow_job, start_job
from deploy.fleet.results import on_all
from deploy.fleet.ssh import Fleet
from deploy.nodes import paths
from deploy.nodes.deployment import Deployment
from deploy.nodes.secret import kept_secret
from deploy.planning.commands import option
from deploy.planning.plans import NodePlan, ServePlan, plan_mark
from deploy.remote.wire import Json
from deploy.steps import processes
from deploy.steps.preflight_checks import SHUT, open_door, tokenless
from deploy.steps.processes import PLAN_MARK, of_job, raylet, stop, stop_hint
from deploy.steps.step import Applied, Looks, ServingStep, Undone, Work, end_jobs
from gracefarm.console import Console
from gracefarm.errors import EngineError, GracefarmError

TOKEN_PATH = "RAY_AUTH_TOKEN_PATH"  # noqa: S105 - the name of a variable
SERVING = (paths.ENGINE_JOB, paths.RAY_JOB)
"Jobs that serve. Other jobs (builds, downloads, checks) may run at the same time."
RELEASE = 10
"Seconds in which Ray must release the GPUs of an engine that has ended."
CORES_PER_START = 2
"Cores that one `ray start` uses. With nine at once on two cores, eight failed by Ray's 15 s limit (ray#65983)."


@dataclass(frozen=True, kw_only=True)
class ClusterSpec:
    """The cluster to start, and timeouts."""

    plan: ServePlan
    python: str
    "Python of the active environment, which imports ray."
    environment: str = ""
    "Id of the active environment; empty: unknown, and not compared."
    token: str | None = field(default=None, repr=False)
    "Ray's token, if the plan's environment has a file for it."
    wave: int | None = None
    "Number of workers to start at the same time; None: by the head's cores."
    seconds: float = 180
    "Timeout of `ray start` on a node, and then until all nodes are alive."
    ask: float = 60
    "Timeout of one request to Ray."

    @property
    def plan_mark(self) -> str:
        """The mark of all processes that are started."""
        return plan_mark(self.plan, self.environment)


@dataclass(frozen=True, kw_only=True)
class Started:
    """The result of starting Ray."""

    started: tuple[str, ...]
    "Nodes on which Ray was started now."
    stopped: tuple[str, ...]
    "Nodes on which Ray ran for another plan."
    gpus: float


def address(plan: ServePlan) -> str:
    """The address of the head's GCS, as host:port."""
    return f"{plan.head.private}:{option(plan.head.ray, '--port') or 6379}"


def ports(argv: Sequence[str]) -> list[int]:
    """The single ports in the arguments of `ray start`."""
    names = [word.partition("=")[0] for word in argv if word.startswith("--") and word.partition("=")[0].endswith("port")]
    values = [option(argv, name) for name in names if name not in ("--min-worker-port", "--max-worker-port")]
    return [int(value) for value in values if value and value.isdigit() and value != "0"]


def serving(seen: Json) -> list[Json]:
    """The processes of Ray and of the engine on a node."""
    return [process for job in SERVING for process in of_job(seen, job)]


def spec_of(deployment: Deployment, plan: ServePlan, environment: str = "") -> ClusterSpec:
    """The cluster of a deployment."""
    return ClusterSpec(
        plan=plan,
        python=paths.program(deployment, "python"),
        environment=environment,
        token=kept_secret(deployment.folder.path / "ray-token", secrets.token_hex(32)),
        wave=deployment.data.options.ray_wave,
    )


class RayStep(ServingStep):
    """Starts Ray on the nodes of the plan."""

    name = "ray"

    async def apply(self, work: Work, looks: Looks) -> Applied:
        """Start Ray where it does not run; nothing to do if the engine connects its nodes without Ray."""
        plan = work.made_plan
        if plan.launcher == "native":
            ended = await make_room(work.fleet, work.nodes, plan, plan_mark(plan, work.environment), work.console)
            return Applied(text=f"none: {plan.engine} connects its nodes without Ray", changed=bool(ended))
        started = await start_missing(work.fleet, work.nodes, spec_of(work.deployment, plan, work.environment), work.console)
        return Applied(
            text=f"{len(plan.nodes)} nodes, {started.gpus:g} GPUs at {address(plan)}",
            data={"plan": plan.id, "nodes": [node.name for node in plan.nodes]},
            changed=bool(started.started),
        )

    async def undo(self, work: Work) -> Undone:
        """Stop Ray and all other processes of this deployment."""
        stopped = [(node, paths.RAY_JOB) for node in work.deployment.nodes]
        return await end_jobs(work, "", grace=5, stopped=stopped)


async def make_room(
    fleet: Fleet, targets: Sequence[RemoteNode], plan: ServePlan, mark: str, console: Console
) -> tuple[str, ...]:
    """Stop our processes if they belong to another plan, or are only a part of this plan without Ray.

    Returns:
        The nodes on which processes of another plan ran.
    """
    looks = await processes.find(targets, fleet.mark, {})
    parts = {node.name: of_job(looks[node.name], paths.ENGINE_JOB) for node in targets}
    others = [
        name
        for name, part in parts.items()
        if of_job(looks[name], paths.RAY_JOB) or any(process["plan"] not in ("", mark) for process in part)
    ]
    wanted = {node.name for node in plan.nodes}
    whole = {name for name, part in parts.items() if part} == wanted
    if others or (any(parts.values()) and not whole):
        what = "processes of a different plan or environment" if others else "an engine that does not run on all nodes"
        console.step("ray", f"stopping {what}")
        await stop(targets, fleet.mark, jobs=SERVING)
    return tuple(others)


async def start_missing(fleet: Fleet, targets: Sequence[RemoteNode], spec: ClusterSpec, console: Console) -> Started:
    """Start exactly the plan's cluster. Nodes on which it already runs are not changed.

    `targets`: all nodes, including spares, on which our Ray is stopped.

    Raises:
        EngineError: Ray did not start, with the cause from its logs; or another process uses a port.
    """
    plan, by_name = spec.plan, {node.name: node for node in targets}
    wanted = {node.name: ports(node.ray) for node in plan.nodes}
    looks = await processes.find(targets, fleet.mark, wanted)
    stopped = await _make_room(targets, looks, spec, fleet.mark, console)
    if stopped:
        looks = await processes.find(targets, fleet.mark, wanted)
    _refuse_foreign(looks, spec)
    missing = [node for node in plan.nodes if not raylet(looks[node.name], spec.plan_mark)]
    cores = looks[plan.head.name]["cores"]
    if missing:
        await _end_engine(targets, looks, fleet.mark, console)
        await _start_nodes(fleet, by_name, missing, spec, cores, console)
    idle = bool(missing) or not any(of_job(looks[node.name], paths.ENGINE_JOB) for node in targets)
    answer = await verify(by_name, spec, idle=idle)
    kept = plan.layout.world - answer["free"]
    if idle and kept > 0:
        console.step(
            "ray", f"starting Ray again: it reserves {kept:g} of {plan.layout.world} GPUs for an engine that has ended"
        )
        await stop(targets, fleet.mark, jobs=[paths.RAY_JOB])
        missing = list(plan.nodes)
        await _start_nodes(fleet, by_name, missing, spec, cores, console)
        answer = await verify(by_name, spec)
    if tokenless(answer["version"]):
        console.warn(f"{open_door(answer['version'])}; {SHUT}")
    return Started(started=tuple(node.name for node in missing), stopped=stopped, gpus=float(plan.layout.world))


async def _start_nodes(
    fleet: Fleet,
    by_name: Mapping[str, RemoteNode],
    missing: Sequence[NodePlan],
    spec: ClusterSpec,
    cores: int,
    console: Console,
) -> None:
    """Run `ray start` on these nodes, in waves. `cores`: of the head."""
    await on_all([by_name[node.name] for node in missing], lambda node: call(node, "cluster.warm", {}, python=spec.python))
    count = 0
    with console.progress("ray") as tick:
        for wave in waves(missing, spec, cores):
            await asyncio.gather(*(_start(fleet, by_name[node.name], node, spec, console) for node in wave))
            count += len(wave)
            tick(count, len(missing), ", ".join(node.name for node in wave))


async def _make_room(
    targets: Sequence[RemoteNode], looks: Mapping[str, Json], spec: ClusterSpec, mark: str, console: Console
) -> tuple[str, ...]:
    """Stop our processes that do not fit: of another plan or environment, on a spare, without a raylet, or without a head."""
    wanted = {node.name for node in spec.plan.nodes}
    headless = not raylet(looks[spec.plan.head.name], spec.plan_mark)

    def fits(node: RemoteNode) -> bool:
        seen = looks[node.name]
        others = any(process["plan"] not in ("", spec.plan_mark) for process in seen["processes"])
        return not headless and node.name in wanted and raylet(seen, spec.plan_mark) and not others

    unfit = [node for node in targets if serving(looks[node.name]) and not fits(node)]
    names = tuple(node.name for node in unfit)
    if unfit:
        console.step(
            "ray", f"stopping processes that are incomplete or belong to a different plan or environment: {', '.join(names)}"
        )
        await _end_engine(targets, looks, mark, console)
        await stop(unfit, mark, jobs=SERVING)
    return names


async def _end_engine(targets: Sequence[RemoteNode], looks: Mapping[str, Json], mark: str, console: Console) -> None:
    """Stop a running engine. It cannot continue with other nodes, and does not notice that a lost node is back."""
    if any(of_job(looks[node.name], paths.ENGINE_JOB) for node in targets):
        console.step("ray", "stopping the engine, because its nodes change")
        await stop(targets, mark, jobs=[paths.ENGINE_JOB])


def _refuse_foreign(looks: Mapping[str, Json], spec: ClusterSpec) -> None:
    for node in spec.plan.nodes:
        seen = looks[node.name]
        if raylet(seen, spec.plan_mark):
            continue
        for port, who in seen["holders"].items():
            raise EngineError(
                f"{node.name}: port {port} is used by {who}, which does not belong to this deployment",
                remedy=stop_hint(who, "stop that process (if it is Ray, run `ray stop` on the node)")
                + ", or set a different port in [ports] of deploy.toml",
            )


def waves(missing: Sequence[NodePlan], spec: ClusterSpec, cores: int) -> list[list[NodePlan]]:
    """Groups of nodes to start together: first the head, then workers in groups of `spec.wave` or by the head's cores."""
    head = [[node] for node in missing if node.name == spec.plan.head.name]
    rest = [node for node in missing if node.name != spec.plan.head.name]
    size = spec.wave or max(1, cores // CORES_PER_START)
    return head + [rest[at : at + size] for at in range(0, len(rest), size)]


async def _start(fleet: Fleet, target: RemoteNode, node: NodePlan, spec: ClusterSpec, console: Console) -> None:
    """Run `ray start` on one node as a detached job. Repeat it once if Ray failed."""
    path = node.env.get(TOKEN_PATH)
    if path and spec.token:
        await put_file(target, spec.token.encode(), path)
    for attempt in (1, 2):
        begun = time.time()
        try:
            await _start_once(fleet, node, spec)
        except GracefarmError as error:
            why = await explain(target, node, spec, since=begun - 5)
            await stop([target], fleet.mark, jobs=[paths.RAY_JOB])
            if attempt == 2 or not isinstance(error, EngineError):
                raise EngineError(f"{error.cause}{': ' + why if why else ''}", remedy=_remedy(target)) from error
            console.warn(f"{node.name}: Ray did not start{' (' + why + ')' if why else ''}; trying once more")
        else:
            return


def _remedy(target: RemoteNode) -> str:
    return f"see Ray's logs with `deploy logs {target.name}`, and check the node with `deploy preflight`"


async def _start_once(fleet: Fleet, node: NodePlan, spec: ClusterSpec) -> None:
    (place,) = fleet.pick([node.name])
    env = {**node.env, PLAN_MARK: spec.plan_mark}
    await start_job(fleet, place, paths.RAY_JOB, shlex.join(node.ray), env)
    lines: list[str] = []
    try:
        async with asyncio.timeout(spec.seconds):
            status = await follow_job(fleet, place, paths.RAY_JOB, lines.append, patience=30)
    except TimeoutError as error:
        raise EngineError(f"{node.name}: `ray start` timed out after {spec.seconds:g} s") from error
    if status.returncode != 0:
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        how = f"failed with exit code {status.returncode}" if status.state == "exited" else "was killed"
        raise EngineError(f"{node.name}: `ray start` {how}{': ' + last if last else ''}")


async def explain(target: RemoteNode, node: NodePlan, spec: ClusterSpec, *, since: float) -> str:
    """The first cause in Ray's logs on a node; empty if there is none."""
    temp = option(node.ray, "--temp-dir") or option(spec.plan.head.ray, "--temp-dir") or "/tmp/ray"  # noqa: S108 - Ray's default
    with suppress(GracefarmError):
        causes = (await call(target, "cluster.cause", {"temp": temp, "since": since}))["lines"]
        return causes[0] if causes else ""
    return ""


async def ask(head: RemoteNode, spec: ClusterSpec) -> Json:
    """Ask Ray for its nodes.

    Raises:
        EngineError: Ray does not answer.
        SshError, NodeError: the head does not answer.
    """
    node = spec.plan.head
    env = {name: value for name, value in node.env.items() if name.startswith("RAY_")}
    request = {"address": address(spec.plan), "ip": node.private, "env": env, "seconds": spec.ask}
    return await call(head, "cluster.nodes", request, python=spec.python)


async def alive(head: RemoteNode, spec: ClusterSpec) -> dict[str, bool]:
    """Whether each node of the plan is alive according to Ray. A restarted node is alive if one of its entries is.

    Raises:
        EngineError: Ray does not answer.
        SshError, NodeError: the head does not answer.
    """
    living = {node["address"] for node in (await ask(head, spec))["nodes"] if node["alive"]}
    return {node.name: node.private in living for node in spec.plan.nodes}


async def verify(by_name: Mapping[str, RemoteNode], spec: ClusterSpec, *, idle: bool = False) -> Json:
    """Wait until exactly the plan's nodes are alive, with exactly its GPUs.

    If `idle`, no engine runs: also wait up to `RELEASE` seconds until Ray has released all GPUs. A placement group that is
    removed while a lost node comes back can keep a GPU forever (seen with Ray 2.60).

    Returns:
        The answer of `cluster.nodes`.

    Raises:
        EngineError: this takes longer than `spec.seconds`; with the nodes and the cause in their logs.
    """
    plan, deadline, released = spec.plan, time.monotonic() + spec.seconds, time.monotonic() + RELEASE
    names = {node.private: node.name for node in plan.nodes}
    while True:
        answer = await ask(by_name[plan.head.name], spec)
        living = {node["address"]: node["gpus"] for node in answer["nodes"] if node["alive"]}
        away = [name for ip, name in names.items() if ip not in living]
        foreign = [ip for ip in living if ip not in names]
        gpus = sum(living.values())
        whole = not away and not foreign and gpus == plan.layout.world
        if whole and (not idle or answer["free"] == gpus or time.monotonic() > released):
            return answer
        if foreign:
            raise EngineError(
                f"Ray has nodes that are not in the plan: {', '.join(foreign)}",
                remedy="run `ray stop` on these nodes, then repeat the command",
            )
        if not whole and time.monotonic() > deadline:
            break
        await asyncio.sleep(1)
    if away:
        node = next(node for node in plan.nodes if node.name == away[0])
        why = await explain(by_name[node.name], node, spec, since=0)
        raise EngineError(f"Ray does not see {', '.join(away)}{': ' + why if why else ''}", remedy=_remedy(by_name[node.name]))
    raise EngineError(
        f"Ray has {gpus:g} GPUs, but the plan requires exactly {plan.layout.world}",
        remedy="check the GPUs of the nodes with `deploy preflight`; `deploy plan` shows how many each node must have",
    )
