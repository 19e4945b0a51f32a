"""Starts the engine as a detached job on the head, on its loopback. It is ready when it answers a completion through SSH.

The engine does not listen before the model is loaded, so connections are refused while it loads. Its /health returns 200 even
with dead workers, so a completion of one token is requested instead (vllm#16259, #11996, #39863, #53157).
"""

from __future__ import annotations

import asyncio
import secrets
import shlex
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from deploy.engine import metrics
from deploy.engine.canary import Reply, ask_one_token
from deploy.engine.log import PHASES, Progress, first_cause, no_cause
from deploy.fleet.calls import RemoteNode, call
from deploy.fleet.forwarding import forward_local, require_forwarding
from deploy.fleet.jobs import JobStatus, follow_job, job_status, start_job, stop_job
from deploy.fleet.ssh import Fleet
from deploy.nodes import paths
from deploy.nodes.deployment import Deployment, Folder, Node
from deploy.nodes.secret import kept_secret
from deploy.planning.commands import option
from deploy.planning.plans import ServePlan, plan_mark
from deploy.planning.shards import GIB
from deploy.remote.wire import Json
from deploy.steps import processes, ray
from deploy.steps.processes import PLAN_MARK
from deploy.steps.step import Applied, Looks, ServingStep, Undone, Work, end_jobs
from gracefarm.console import Console
from gracefarm.errors import EngineError, GracefarmError

Nodes = Mapping[str, bool]
"Whether each node is alive according to Ray; without Ray, whether the engine runs on it."


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """The engine to start, and timeouts."""

    plan: ServePlan
    secrets: Mapping[str, str] = field(repr=False)
    "Values of the plan's secret_env."
    nodes: Callable[[], Awaitable[Nodes]]
    "Gets the state of the nodes. Called regularly while the engine loads."
    targets: Sequence[RemoteNode] = ()
    "The plan's nodes. The memory of their GPUs must be free before the engine starts."
    environment: str = ""
    "Id of the active environment; empty: unknown, and not compared."
    load: float = 7200
    "Maximum seconds from the start to the first completion."
    canary: float = 120
    "Maximum seconds of a completion of one token."
    poll: float = 2.0
    check: float = 30.0
    "Seconds between requests to Ray."
    release: float = 30.0
    "Maximum seconds until the processes of a stopped engine have released the memory of their GPUs."
    settle: float = 30.0
    "Maximum seconds until Ray reports a dead node. It took 15 s after a raylet was killed."
    last: Mapping[str, float] = field(default_factory=dict)
    "Seconds of each phase of the last start."

    @property
    def plan_mark(self) -> str:
        """The mark of the engine's processes."""
        return plan_mark(self.plan, self.environment)

    @property
    def key(self) -> str | None:
        """The API key, for the bearer header."""
        return next((value for name, value in self.secrets.items() if name.endswith("API_KEY")), None)


@dataclass(frozen=True, kw_only=True)
class Answering:
    """An engine that answers, and how it was started."""

    how: Literal["running", "attached", "started"]
    seconds: float
    phases: Mapping[str, float]
    model: str


def api_key(folder: Folder) -> str:
    """The deployment's API key, generated once."""
    return kept_secret(folder.api_key, "gf-" + secrets.token_urlsafe(32))


def port(plan: ServePlan) -> int:
    """The port of the engine on the head's loopback."""
    return int(option(plan.serve, "--port") or 2242)


def spec_of(
    deployment: Deployment,
    plan: ServePlan,
    cluster: ray.ClusterSpec,
    head: RemoteNode,
    last: Mapping[str, float],
    nodes: Callable[[], Awaitable[Nodes]] | None = None,
    targets: Sequence[RemoteNode] = (),
) -> EngineSpec:
    """The engine of a deployment. `last`: seconds of each phase of the last start."""
    return EngineSpec(
        plan=plan,
        secrets=dict.fromkeys(plan.secret_env, api_key(deployment.folder)),
        nodes=nodes or (lambda: ray.alive(head, cluster)),
        targets=targets,
        environment=cluster.environment,
        load=deployment.data.options.load_timeout,
        last=last,
    )


class EngineStep(ServingStep):
    """Starts the engine."""

    name = "engine"

    async def apply(self, work: Work, looks: Looks) -> Applied:
        """Start the engine or attach to an interrupted start, and wait for a completion (deploy/engine/canary.py)."""
        plan, head, state = work.made_plan, work.nodes[0], work.keeper.state
        cluster = ray.spec_of(work.deployment, plan, work.environment)
        parts = partial(parts_alive, work.fleet, plan) if plan.launcher == "native" else None
        names = {node.name for node in plan.nodes}
        targets = [node for node in work.nodes if node.name in names]
        spec = spec_of(work.deployment, plan, cluster, head, state.data("load"), parts, targets)
        answering = await start_or_attach(work.fleet, head, spec, work.console)
        running = answering.how == "running"
        if answering.how == "started":  # kept when the engine is stopped, to estimate the next start
            work.keeper.begin("load", plan.id)
            work.keeper.end("load", "done", "seconds of each phase of the last start", dict(answering.phases))
        return Applied(
            text=f"{answering.model} answers" + ("" if running else f" after {answering.seconds:.0f} s"),
            data={"plan": plan.id, "port": port(plan), "model": answering.model},
            changed=not running,
            answer={"model": answering.model, "how": answering.how, "seconds": round(answering.seconds, 2)},
        )

    async def undo(self, work: Work) -> Undone:
        """Stop the engine."""
        stopped = [(node, paths.ENGINE_JOB) for node in work.deployment.nodes]
        return await end_jobs(work, paths.ENGINE_JOB, grace=20, stopped=stopped)


async def parts_alive(fleet: Fleet, plan: ServePlan) -> Nodes:
    """Whether the engine runs on each node, for an engine without Ray. The head counts as alive.

    Raises:
        SshError, NodeError: a node was not reached.
    """
    places = fleet.pick([node.name for node in plan.followers]) if plan.followers else []
    states = await asyncio.gather(*(job_status(fleet, place, paths.ENGINE_JOB) for place in places))
    running = {place.name: status.state == "running" for place, status in zip(places, states, strict=True)}
    return {plan.head.name: True, **running}


async def start_or_attach(fleet: Fleet, head: RemoteNode, spec: EngineSpec, console: Console) -> Answering:
    """Start the engine unless it runs with this plan and environment, and wait for a completion.

    If the engine is already loading, wait for it.

    Raises:
        EngineError: the engine ended (with the first cause in its log), Ray lost a node, or it is not ready in time.
        ForwardingError: the head's sshd forbids forwarding, so nothing is started.
    """
    (place,) = fleet.pick([head.name])
    await require_forwarding(fleet, place, port(spec.plan))
    begun = time.monotonic()
    status = await job_status(fleet, place, paths.ENGINE_JOB)
    seen = (await processes.find([head], fleet.mark, {head.name: [port(spec.plan)]}))[head.name]
    left = processes.of_job(seen, paths.ENGINE_JOB)
    followers = fleet.pick([node.name for node in spec.plan.followers]) if spec.plan.followers else []
    whole = all([(await job_status(fleet, follower, paths.ENGINE_JOB)).state == "running" for follower in followers])
    same = status.state == "running" and whole and all(process["plan"] == spec.plan_mark for process in left)
    if same:
        answer = await _ask_running(fleet, place, spec)
        if answer.kind == "ok":
            return Answering(how="running", seconds=answer.seconds, phases=spec.last, model=answer.model)
        if answer.kind == "refused":
            console.step("engine", "the engine is already loading; waiting for it")
        else:
            console.step("engine", f"the engine is running, but generates no tokens ({answer.text}); restarting it")
            same = False
    elif not left and seen["holders"]:
        who = next(iter(seen["holders"].values()))
        raise EngineError(
            f"{head.name}: port {port(spec.plan)} is used by {who}, which does not belong to this deployment",
            remedy=processes.stop_hint(who, "stop that process")
            + ", or set `engine` in [ports] of deploy.toml to a different port",
        )
    elif left:
        console.step("engine", "stopping the engine of a different plan or environment")
    if not same:
        await asyncio.gather(*(stop_job(fleet, node, paths.ENGINE_JOB, grace=30) for node in (place, *followers)))
        await _require_memory(spec, console)
        env = {**spec.plan.serve_env, PLAN_MARK: spec.plan_mark}
        for follower, node in zip(followers, spec.plan.followers, strict=True):
            await start_job(fleet, follower, paths.ENGINE_JOB, shlex.join(node.engine), {**env, **node.env})
        await start_job(fleet, place, paths.ENGINE_JOB, shlex.join(spec.plan.serve), {**env, **spec.secrets})
    return await _watch(fleet, place, spec, console, begun=begun, how="attached" if same else "started")


async def _require_memory(spec: EngineSpec, console: Console) -> None:
    """Raise EngineError if another process uses so much memory of a GPU that the engine cannot start.

    The rule is vLLM's: gpu_memory_utilization of the GPU's memory must be free. vLLM applies it about a minute later, and its
    message does not contain the node. A GPU that the driver does not report is not checked.
    """
    deadline, told = time.monotonic() + spec.release, False
    while True:
        answers = await asyncio.gather(*(call(node, "driver.memory", {}) for node in spec.targets))
        used = [_used(spec.plan, node.name, answer) for node, answer in zip(spec.targets, answers, strict=True)]
        full = next((text for text in used if text), None)
        if full is None:
            return
        if time.monotonic() > deadline:
            raise EngineError(
                f"{full}; another process uses GPU memory there",
                remedy="find the process with `nvidia-smi` on that node and stop it, or set a smaller"
                " gpu_memory_utilization in [layout] of deploy.toml, then repeat the command",
            )
        if not told:
            console.step("engine", f"waiting up to {spec.release:.0f} s for GPU memory: {full}")
            told = True
        await asyncio.sleep(spec.poll)


def _used(plan: ServePlan, name: str, answer: Json) -> str | None:
    """The first GPU of a node that has too little free memory, of the GPUs that the plan uses."""
    count = next(node.gpus for node in plan.nodes if node.name == name)
    for index, gpu in enumerate(answer.get("gpus", [])[:count]):
        if gpu["free"] < plan.layout.gmu * gpu["total"]:
            free, total, wanted = gpu["free"] / GIB, gpu["total"] / GIB, plan.layout.gmu * gpu["total"] / GIB
            return f"{name}: GPU {index} has {free:.1f} of {total:.1f} GiB free, but the engine requires {wanted:.1f} GiB"
    return None


async def _ask_running(fleet: Fleet, place: Node, spec: EngineSpec) -> Reply:
    """Request a completion from a running engine. An engine that generates tokens for others counts as answering."""
    async with forward_local(fleet, place, 0, port(spec.plan)) as local:
        before = await metrics.scrape(local)
        answer = await _ask(local, spec)
        if answer.kind == "timeout" and metrics.moved(before, await metrics.scrape(local)):
            return Reply(kind="ok", seconds=answer.seconds, model=answer.model)
        return answer


async def _ask(local: int, spec: EngineSpec) -> Reply:
    answer = await ask_one_token(local, spec.key, spec.canary)
    if answer.kind == "denied":
        raise EngineError("the engine refuses this deployment's key", remedy="run `deploy down`, then `deploy serve`")
    return answer


async def _watch(
    fleet: Fleet, place: Node, spec: EngineSpec, console: Console, *, begun: float, how: Literal["attached", "started"]
) -> Answering:
    progress = Progress()
    following = asyncio.create_task(follow_job(fleet, place, paths.ENGINE_JOB, progress.feed))
    checking: asyncio.Task[Nodes] | None = None
    checked, told, warned = time.monotonic(), "", ""
    try:
        async with forward_local(fleet, place, 0, port(spec.plan)) as local:
            with console.progress("engine") as tick:
                while True:
                    asking = asyncio.create_task(_ask(local, spec))
                    await asyncio.wait({asking, following}, return_when=asyncio.FIRST_COMPLETED)
                    if following.done():
                        asking.cancel()
                        raise await _ended(spec, following.result(), progress)
                    answer = await asking
                    if answer.kind == "ok":
                        phases = progress.durations()
                        return Answering(how=how, seconds=time.monotonic() - begun, phases=phases, model=answer.model)
                    if progress.phase != told:
                        told = progress.phase
                        console.step("engine", told + _left(progress, spec))
                    tick(round(100 * (progress.fraction or 0)), 100 if progress.fraction else None, _text(progress, spec))
                    warned = _warned(progress, spec, console, warned)
                    if time.monotonic() - begun > spec.load:
                        await _give_up(fleet, place, spec, progress)
                    if checking is None and time.monotonic() - checked > spec.check:
                        checking, checked = asyncio.create_task(_alive(spec)), time.monotonic()
                    if checking is not None and checking.done():
                        await _lost(fleet, place, spec, checking.result(), progress)
                        checking = None
                    await asyncio.wait({following}, timeout=spec.poll)
    finally:
        for task in (following, checking):
            if task is not None:
                task.cancel()
                with suppress(asyncio.CancelledError, GracefarmError):
                    await task


async def _alive(spec: EngineSpec) -> Nodes:
    """The state of the nodes; empty if Ray does not answer. If Ray is lost, the engine fails by itself."""
    with suppress(GracefarmError):
        return await spec.nodes()
    return {}


def _left(progress: Progress, spec: EngineSpec) -> str:
    left = progress.left(spec.last)
    if left is not None:
        return f", about {left:.0f} s left"
    before = spec.last.get(progress.phase)
    return f", longer than last time ({before:.0f} s)" if before is not None and progress.elapsed() > before else ""


def _warned(progress: Progress, spec: EngineSpec, console: Console, before: str) -> str:
    """Warn once for each phase that takes far too long. Return the phase of the last warning."""
    if progress.phase == before or not progress.overdue(spec.last):
        return before
    console.warn(_slow(progress, spec))
    return progress.phase


def _slow(progress: Progress, spec: EngineSpec) -> str:
    """The warning about a phase that may hang."""
    last = no_cause(progress.lines).line
    line = f"; the last line of its log: {last[:200]}" if last else ""
    usual = progress.usual(spec.last) or 0.0
    return (
        f"the engine has been in phase `{progress.phase}` for {progress.elapsed():.0f} s (usually {usual:.0f} s){line}. "
        "It may hang: `deploy preflight` checks the nodes and their network, and `deploy collect` collects the stack of each "
        "rank"
    )


def _text(progress: Progress, spec: EngineSpec) -> str:
    percent = f" {progress.fraction:.0%}" if progress.fraction is not None else ""
    return f"{progress.phase}{percent}, {progress.elapsed():.0f} s{_left(progress, spec)}"


async def _give_up(fleet: Fleet, place: Node, spec: EngineSpec, progress: Progress) -> None:
    if progress.phase == PHASES[-1]:  # the engine is ready but not reachable, so it is not stopped
        raise EngineError(
            f"the engine answered no request within {spec.load:g} s, but its log says that it listens; the engine "
            "is still running",
            remedy="find the reason with `deploy status`, and read the engine's log with `deploy logs`",
        )
    await stop_job(fleet, place, paths.ENGINE_JOB)
    raise EngineError(
        f"the engine answered no request within {spec.load:g} s and was stopped; it had been in phase `{progress.phase}` "
        f"for {progress.elapsed():.0f} s",
        remedy="read the engine's log with `deploy logs`; if the engine needs more time, increase load_timeout in "
        "[options] of deploy.toml",
    )


async def _lost(fleet: Fleet, place: Node, spec: EngineSpec, nodes: Nodes, progress: Progress) -> None:
    dead = [name for name, alive in nodes.items() if not alive]
    if dead:
        cause = await _cause_there(fleet, spec, dead)
        await stop_job(fleet, place, paths.ENGINE_JOB)
        raise EngineError(
            f"{spec.plan.lost(dead)} while the engine was in phase `{progress.phase}`; the engine was stopped{cause}",
            remedy="check the node with `deploy preflight`, then restart with `deploy serve`",
        )


async def _cause_there(fleet: Fleet, spec: EngineSpec, names: Sequence[str]) -> str:
    """Why an engine without Ray ended on the first of these nodes, from its log."""
    if spec.plan.launcher == "ray":
        return ""
    place, lines = fleet.pick(names[:1])[0], list[str]()
    with suppress(GracefarmError):
        status = await follow_job(fleet, place, paths.ENGINE_JOB, lines.append, patience=10)
        return f": {place.name}: {first_cause(lines, {}, returncode=status.returncode).text}"
    return ""


async def _ended(spec: EngineSpec, status: JobStatus, progress: Progress) -> EngineError:
    """The error for the end of the engine, with the first cause. If a worker died, also with the node that Ray lost."""
    names = {node.private: node.name for node in spec.plan.nodes}
    cause = first_cause(progress.lines, names, returncode=status.returncode)
    how = {"exited": f"exited with code {status.returncode}", "stopped": "was stopped by another command"}.get(
        status.state, "was killed"
    )
    if status.state != "exited" and cause.kind in ("unknown", "none"):
        return EngineError(
            f"the engine {how} in phase `{progress.phase}`",
            remedy="read the engine's log with `deploy logs`, then repeat the command",
        )
    if cause.kind == "none":
        return EngineError(f"the engine {how}: {cause.text}", remedy=cause.remedy)
    dead = await _dead(spec) if cause.consequence else []
    lost = f"{spec.plan.lost(dead)}; " if dead else ""
    return EngineError(f"the engine {how} in phase `{progress.phase}`: {lost}{cause.text}", remedy=cause.remedy)


async def _dead(spec: EngineSpec) -> list[str]:
    """Nodes that Ray has lost. Ray may report them some seconds after the engine has ended."""
    deadline = time.monotonic() + spec.settle
    while True:
        dead = [name for name, alive in (await _alive(spec)).items() if not alive]
        if dead or time.monotonic() > deadline:
            return dead
        await asyncio.sleep(spec.poll)
