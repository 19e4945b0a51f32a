"""Ray by `ray start`: the plan's commands and environments exactly, head first, workers in waves; verified by asking Ray.

Ray does not supervise what `ray start` has left (ray#2587), so everything here looks at the nodes: processes are told by the
mark and the plan's id in their environment, never by their names.
"""

from __future__ import annotations

import asyncio
import secrets
import shlex
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from deploy.fleet.calls import RemoteNode, call
from deploy.fleet.files import put_file
from deploy.fleet.jobs import follow_job, start_job
from deploy.fleet.results import on_all
from deploy.fleet.ssh import Fleet
from deploy.nodes import paths
from deploy.nodes.deployment import Deployment
from deploy.planning.plans import NodePlan, ServePlan, plan_mark
from deploy.remote.wire import Json
from deploy.steps import processes
from deploy.steps.preflight_checks import SHUT, open_door, tokenless
from deploy.steps.processes import PLAN_MARK, of_job, raylet, stop
from deploy.steps.step import Applied, Looks, ServingStep, Undone, Work, end_jobs
from gracefarm.console import Console
from gracefarm.errors import EngineError, GracefarmError
from gracefarm.files import atomic_write

TOKEN_PATH = "RAY_AUTH_TOKEN_PATH"  # noqa: S105 - the name of a variable
SERVING = (paths.ENGINE_JOB, paths.RAY_JOB)
"Jobs that serve. Others (builds, downloads, checks) may be at work beside them and are in nobody's way."
CORES_PER_START = 2
"Cores that one `ray start` keeps busy; nine at once on two cores: eight died of Ray's own 15 s limit (ray#65983)."


@dataclass(frozen=True, kw_only=True)
class ClusterSpec:
    """What is to run, and how long to wait."""

    plan: ServePlan
    python: str
    "Of the active environment: the one that imports ray."
    environment: str = ""
    "The active environment's id; empty: not known, and not compared."
    token: str | None = field(default=None, repr=False)
    "Ray's token, where the plan's environment names a file for it."
    wave: int | None = None
    "Workers started at once; None: by the head's cores."
    seconds: float = 180
    "For `ray start` on a node, and again until all nodes are alive."
    ask: float = 60
    "For one question to Ray."

    @property
    def plan_mark(self) -> str:
        """What everything that is started here carries, and by which it is known again."""
        return plan_mark(self.plan, self.environment)


@dataclass(frozen=True, kw_only=True)
class Started:
    """What was done."""

    started: tuple[str, ...]
    "Nodes on which Ray was started now."
    stopped: tuple[str, ...]
    "Nodes on which a Ray of ours ran that did not fit this plan."
    gpus: float


def address(plan: ServePlan) -> str:
    """Of the head's GCS: host:port."""
    return f"{plan.head.private}:{option(plan.head.ray, '--port') or 6379}"


def option(argv: Sequence[str], name: str) -> str | None:
    """The value of `--name value` or `--name=value`."""
    for index, word in enumerate(argv):
        if word.startswith(name + "="):
            return word.partition("=")[2]
        if word == name and index + 1 < len(argv):
            return argv[index + 1]
    return None


def ports(argv: Sequence[str]) -> list[int]:
    """Every single port that `ray start` is told to listen on."""
    names = [word.partition("=")[0] for word in argv if word.startswith("--") and word.partition("=")[0].endswith("port")]
    values = [option(argv, name) for name in names if name not in ("--min-worker-port", "--max-worker-port")]
    return [int(value) for value in values if value and value.isdigit() and value != "0"]


def serving(seen: Json) -> list[Json]:
    """Processes of Ray and of the engine there."""
    return [process for job in SERVING for process in of_job(seen, job)]


def spec_of(deployment: Deployment, plan: ServePlan, environment: str = "") -> ClusterSpec:
    """How a deployment's Ray is started and asked."""
    return ClusterSpec(
        plan=plan,
        python=paths.program(deployment, "python"),
        environment=environment,
        token=kept_secret(deployment.folder.path / "ray-token", secrets.token_hex(32)),
        wave=deployment.data.options.ray_wave,
    )


def kept_secret(path: Path, fresh: str) -> str:
    """What the file holds, or `fresh`, which it holds from now on; 0600."""
    with suppress(FileNotFoundError):
        return path.read_text().strip()
    atomic_write(path, fresh + "\n")
    path.chmod(0o600)
    return fresh


class RayStep(ServingStep):
    """The plan's Ray on its nodes."""

    name = "ray"

    async def apply(self, work: Work, looks: Looks) -> Applied:
        """Start what is missing; nothing where the engine brings its nodes together by itself."""
        plan = work.made_plan
        if plan.launcher == "native":
            ended = await make_room(work.fleet, work.nodes, plan, plan_mark(plan, work.environment), work.console)
            return Applied(text=f"none: {plan.engine} brings its nodes together by itself", changed=bool(ended))
        started = await start_missing(work.fleet, work.nodes, spec_of(work.deployment, plan, work.environment), work.console)
        return Applied(
            text=f"{len(plan.nodes)} nodes, {started.gpus:g} GPUs at {address(plan)}",
            data={"plan": plan.id, "nodes": [node.name for node in plan.nodes]},
            changed=bool(started.started),
        )

    async def undo(self, work: Work) -> Undone:
        """End Ray, and with it everything of ours that is left."""
        stopped = [(node, paths.RAY_JOB) for node in work.deployment.nodes]
        return await end_jobs(work, "", grace=5, stopped=stopped)


async def make_room(
    fleet: Fleet, targets: Sequence[RemoteNode], plan: ServePlan, mark: str, console: Console
) -> tuple[str, ...]:
    """Stop what is ours and is not all of this plan without Ray; the nodes where something of another plan ran."""
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
        what = "with another plan or environment" if others else "in part"
        console.step("ray", f"stopping what runs {what}")
        await stop(targets, fleet.mark, jobs=SERVING)
    return tuple(others)


async def start_missing(fleet: Fleet, targets: Sequence[RemoteNode], spec: ClusterSpec, console: Console) -> Started:
    """Bring exactly the plan's cluster up; nothing is touched where it runs already.

    `targets`: all nodes, spares too; a Ray of ours on one of those is stopped.
    Raises:
        EngineError: Ray did not come up, with the cause out of its own logs; a port is held by somebody else's.
    """
    plan, by_name = spec.plan, {node.name: node for node in targets}
    wanted = {node.name: ports(node.ray) for node in plan.nodes}
    looks = await processes.find(targets, fleet.mark, wanted)
    stopped = await _make_room(targets, looks, spec, fleet.mark, console)
    if stopped:
        looks = await processes.find(targets, fleet.mark, wanted)
    _refuse_foreign(looks, spec)
    missing = [node for node in plan.nodes if not raylet(looks[node.name], spec.plan_mark)]
    if missing:
        await _end_engine(targets, looks, fleet.mark, console)
        await on_all([by_name[node.name] for node in missing], lambda node: call(node, "cluster.warm", {}, python=spec.python))
        count = 0
        with console.progress("ray") as tick:
            for wave in waves(missing, spec, looks[plan.head.name]["cores"]):
                await asyncio.gather(*(_start(fleet, by_name[node.name], node, spec, console) for node in wave))
                count += len(wave)
                tick(count, len(missing), ", ".join(node.name for node in wave))
    gpus, version = await verify(by_name, spec)
    if tokenless(version):
        console.warn(f"{open_door(version)}; {SHUT}")
    return Started(started=tuple(node.name for node in missing), stopped=stopped, gpus=gpus)


async def _make_room(
    targets: Sequence[RemoteNode], looks: Mapping[str, Json], spec: ClusterSpec, mark: str, console: Console
) -> tuple[str, ...]:
    """Stop what is ours and does not fit: another plan or environment, a spare, anything without its raylet, all of it without
    a head."""
    wanted = {node.name for node in spec.plan.nodes}
    headless = not raylet(looks[spec.plan.head.name], spec.plan_mark)

    def fits(node: RemoteNode) -> bool:
        seen = looks[node.name]
        others = any(process["plan"] not in ("", spec.plan_mark) for process in seen["processes"])
        return not headless and node.name in wanted and raylet(seen, spec.plan_mark) and not others

    unfit = [node for node in targets if serving(looks[node.name]) and not fits(node)]
    names = tuple(node.name for node in unfit)
    if unfit:
        console.step("ray", f"stopping what runs with another plan or environment, or half: {', '.join(names)}")
        await _end_engine(targets, looks, mark, console)
        await stop(unfit, mark, jobs=SERVING)
    return names


async def _end_engine(targets: Sequence[RemoteNode], looks: Mapping[str, Json], mark: str, console: Console) -> None:
    """An engine that is there already cannot go on without one of its nodes, and does not notice that it came back."""
    if any(of_job(looks[node.name], paths.ENGINE_JOB) for node in targets):
        console.step("ray", "stopping the engine, which has lost a node")
        await stop(targets, mark, jobs=[paths.ENGINE_JOB])


def _refuse_foreign(looks: Mapping[str, Json], spec: ClusterSpec) -> None:
    for node in spec.plan.nodes:
        seen = looks[node.name]
        if raylet(seen, spec.plan_mark):
            continue
        for port, who in seen["holders"].items():
            raise EngineError(
                f"{node.name}: port {port} is held by {who}, which is not of this deployment",
                remedy="stop it there (a Ray of somebody else: `ray stop`), or choose another port in [ports] of deploy.toml",
            )


def waves(missing: Sequence[NodePlan], spec: ClusterSpec, cores: int) -> list[list[NodePlan]]:
    """Who is started together: the head by itself, then workers, by `spec.wave` or the head's cores."""
    head = [[node] for node in missing if node.name == spec.plan.head.name]
    rest = [node for node in missing if node.name != spec.plan.head.name]
    size = spec.wave or max(1, cores // CORES_PER_START)
    return head + [rest[at : at + size] for at in range(0, len(rest), size)]


async def _start(fleet: Fleet, target: RemoteNode, node: NodePlan, spec: ClusterSpec, console: Console) -> None:
    """`ray start` on one node as a detached job; once more, where Ray gave up on its own children."""
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
            console.warn(f"{node.name}: Ray did not start{' (' + why + ')' if why else ''}; once more")
        else:
            return


def _remedy(target: RemoteNode) -> str:
    return f"`deploy logs {target.name}` shows Ray's logs there; `deploy preflight` what the node lacks"


async def _start_once(fleet: Fleet, node: NodePlan, spec: ClusterSpec) -> None:
    (place,) = fleet.pick([node.name])
    env = {**node.env, PLAN_MARK: spec.plan_mark}
    await start_job(fleet, place, paths.RAY_JOB, shlex.join(node.ray), env)
    lines: list[str] = []
    try:
        async with asyncio.timeout(spec.seconds):
            status = await follow_job(fleet, place, paths.RAY_JOB, lines.append, patience=30)
    except TimeoutError as error:
        raise EngineError(f"{node.name}: `ray start` has not ended after {spec.seconds:g} s") from error
    if status.returncode != 0:
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        word = f"ended with {status.returncode}" if status.state == "exited" else "was killed"
        raise EngineError(f"{node.name}: `ray start` {word}{': ' + last if last else ''}")


async def explain(target: RemoteNode, node: NodePlan, spec: ClusterSpec, *, since: float) -> str:
    """The first cause that Ray's own logs on a node know, or nothing."""
    temp = option(node.ray, "--temp-dir") or option(spec.plan.head.ray, "--temp-dir") or "/tmp/ray"  # noqa: S108 - Ray's own
    with suppress(GracefarmError):
        causes = (await call(target, "cluster.cause", {"temp": temp, "since": since}))["lines"]
        return causes[0] if causes else ""
    return ""


async def ask(head: RemoteNode, spec: ClusterSpec) -> Json:
    """What Ray says of its nodes. Raises EngineError: it does not answer; SshError, NodeError: the head does not."""
    node = spec.plan.head
    env = {name: value for name, value in node.env.items() if name.startswith("RAY_")}
    request = {"address": address(spec.plan), "ip": node.private, "env": env, "seconds": spec.ask}
    return await call(head, "cluster.nodes", request, python=spec.python)


async def alive(head: RemoteNode, spec: ClusterSpec) -> dict[str, bool]:
    """Of each node of the plan, whether Ray says that it is alive. One that was started again counts by its living part.

    Raises:
        EngineError: Ray does not answer; SshError, NodeError: the head does not.
    """
    living = {node["address"] for node in (await ask(head, spec))["nodes"] if node["alive"]}
    return {node.name: node.private in living for node in spec.plan.nodes}


async def verify(by_name: Mapping[str, RemoteNode], spec: ClusterSpec) -> tuple[float, str]:
    """All of the plan's nodes are alive, no other is, and there are exactly its GPUs; their number, and Ray's version.

    Raises:
        EngineError: not within `spec.seconds`; names the nodes and the cause in their logs.
    """
    plan, deadline = spec.plan, time.monotonic() + spec.seconds
    names = {node.private: node.name for node in plan.nodes}
    while True:
        answer = await ask(by_name[plan.head.name], spec)
        living = {node["address"]: node["gpus"] for node in answer["nodes"] if node["alive"]}
        away = [name for ip, name in names.items() if ip not in living]
        foreign = [ip for ip in living if ip not in names]
        gpus = sum(living.values())
        if not away and not foreign and gpus == plan.layout.world:
            return float(gpus), str(answer["version"])
        if foreign:
            raise EngineError(
                f"Ray has nodes that are not in the plan: {', '.join(foreign)}", remedy="`ray stop` there, then repeat"
            )
        if time.monotonic() > deadline:
            break
        await asyncio.sleep(1)
    if away:
        node = next(node for node in plan.nodes if node.name == away[0])
        why = await explain(by_name[node.name], node, spec, since=0)
        raise EngineError(f"Ray does not see {', '.join(away)}{': ' + why if why else ''}", remedy=_remedy(by_name[node.name]))
    raise EngineError(
        f"Ray has {gpus:g} GPUs, and the plan needs exactly {plan.layout.world}", remedy="`deploy plan` shows each node's"
    )
