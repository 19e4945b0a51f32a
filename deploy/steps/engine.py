"""The engine: a detached job on the head, bound to loopback; ready when a real completion came back through SSH.

The port does not listen before the model is loaded, so a refused connection is the normal state of loading. /health of the
engine says 200 for dead workers, so it is never asked: a completion of one token is (vllm#16259, #11996, #39863, #53157).
"""

from __future__ import annotations

import asyncio
import secrets
import shlex
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from deploy.fleet.calls import Json, Target
from deploy.fleet.ssh import Fleet, JobStatus
from deploy.nodes import paths
from deploy.nodes.inventory import Folder, Node
from deploy.planning.plan import Plan, carried
from deploy.steps import metrics as engine_metrics
from deploy.steps.enginelog import Progress, first_cause
from deploy.steps.ray import PLAN, look, option, ours
from gracefarm.console import Console
from gracefarm.errors import EngineError, GracefarmError
from gracefarm.files import atomic_write

if TYPE_CHECKING:
    import httpx

Nodes = Mapping[str, bool]
"Node name to whether Ray says that it is alive."


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What is to run, and how long to wait."""

    plan: Plan
    secrets: Mapping[str, str] = field(repr=False)
    "Values of the plan's secret_env."
    nodes: Callable[[], Awaitable[Nodes]]
    "Ray's nodes, asked again now and then while it loads."
    environment: str = ""
    "The active environment's id; empty: not known, and not compared."
    load: float = 7200
    "Seconds from the start to the first completion."
    canary: float = 120
    "Seconds that one completion of one token may take."
    poll: float = 2.0
    check: float = 30.0
    "Seconds between two questions to Ray."
    settle: float = 30.0
    "Seconds that Ray may take to find a node dead: 15 s after a raylet was killed."
    last: Mapping[str, float] = field(default_factory=dict)
    "Seconds of each phase, last time."

    @property
    def carries(self) -> str:
        """What the engine carries, and by which it is known again."""
        return carried(self.plan, self.environment)

    @property
    def key(self) -> str | None:
        """What the engine wants as bearer."""
        return next((value for name, value in self.secrets.items() if name.endswith("API_KEY")), None)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """It answers."""

    how: Literal["running", "attached", "started"]
    seconds: float
    phases: Mapping[str, float]
    model: str


def api_key(folder: Folder) -> str:
    """The deployment's key, generated once, 0600."""
    with suppress(FileNotFoundError):
        return folder.api_key.read_text().strip()
    key = "gf-" + secrets.token_urlsafe(32)
    atomic_write(folder.api_key, key + "\n")
    folder.api_key.chmod(0o600)
    return key


def port(plan: Plan) -> int:
    """Where it listens, on the head's loopback."""
    return int(option(plan.serve, "--port") or 2242)


async def up(fleet: Fleet, head: Target, spec: Spec, console: Console) -> Outcome:
    """Start it unless it runs with this very plan and environment, and wait for a real completion; attach to a start that
    somebody left.

    Raises:
        EngineError: it ended, with the first cause in its log; Ray lost a node; not ready within `spec.load` seconds.
    """
    (place,) = fleet.pick([head.name])
    begun = time.monotonic()
    status = await fleet.job_status(place, paths.ENGINE_JOB)
    found = (await look([head], fleet.mark, {head.name: [port(spec.plan)]}))[head.name]
    left = ours(found, paths.ENGINE_JOB)
    same = status.state == "running" and all(one["plan"] == spec.carries for one in left)
    if same:
        answer = await _ask_running(fleet, place, spec)
        if answer.kind == "ok":
            return Outcome(how="running", seconds=answer.seconds, phases=spec.last, model=answer.model)
        if answer.kind == "refused":
            console.step("engine", "it is loading already: following it")
        else:
            console.step("engine", f"it runs and makes no token ({answer.text}): starting it anew")
            same = False
    elif not left and found["holders"]:
        who = next(iter(found["holders"].values()))
        raise EngineError(
            f"{head.name}: port {port(spec.plan)} is held by {who}, which is not of this deployment",
            remedy="end it there, or choose another `engine` in [ports] of deploy.toml",
        )
    elif left:
        console.step("engine", "stopping the one that runs with another plan or environment")
    if not same:
        await fleet.stop_job(place, paths.ENGINE_JOB, grace=30)
        env = {**spec.plan.serve_env, PLAN: spec.carries, **spec.secrets}
        await fleet.start_job(place, paths.ENGINE_JOB, shlex.join(spec.plan.serve), env)
    return await _watch(fleet, place, spec, console, begun=begun, how="attached" if same else "started")


async def _ask_running(fleet: Fleet, place: Node, spec: Spec) -> Answer:
    """A completion from an engine that runs; while it makes tokens for others it counts as answering."""
    async with fleet.forward_local(place, 0, "127.0.0.1", port(spec.plan)) as local:
        before = await metrics(local)
        answer = await complete(local, spec.key, spec.canary)
        if answer.kind == "denied":
            raise EngineError("the engine refuses this deployment's key", remedy="`deploy down`, then `deploy serve`")
        if answer.kind == "timeout" and moved(before, await metrics(local)):
            return Answer(kind="ok", seconds=answer.seconds, model=answer.model)
        return answer


async def _watch(
    fleet: Fleet, place: Node, spec: Spec, console: Console, *, begun: float, how: Literal["attached", "started"]
) -> Outcome:
    progress = Progress()
    following = asyncio.create_task(fleet.follow_job(place, paths.ENGINE_JOB, progress.feed))
    checking: asyncio.Task[Nodes] | None = None
    checked, told = time.monotonic(), ""
    try:
        async with fleet.forward_local(place, 0, "127.0.0.1", port(spec.plan)) as local:
            with console.progress("engine") as tick:
                while True:
                    asking = asyncio.create_task(complete(local, spec.key, spec.canary))
                    await asyncio.wait({asking, following}, return_when=asyncio.FIRST_COMPLETED)
                    if following.done():
                        asking.cancel()
                        raise await _ended(spec, following.result(), progress)
                    answer = await asking
                    if answer.kind == "ok":
                        phases = progress.durations()
                        return Outcome(how=how, seconds=time.monotonic() - begun, phases=phases, model=answer.model)
                    if answer.kind == "denied":
                        raise EngineError(
                            "the engine refuses this deployment's key", remedy="`deploy down`, then `deploy serve`"
                        )
                    told = _tell(console, progress, spec, told)
                    tick(round(100 * (progress.fraction or 0)), 100 if progress.fraction else None, _text(progress, spec))
                    if time.monotonic() - begun > spec.load:
                        await _give_up(fleet, place, spec, progress)
                    if checking is None and time.monotonic() - checked > spec.check:
                        checking, checked = asyncio.create_task(_alive(spec)), time.monotonic()
                    if checking is not None and checking.done():
                        await _lost(fleet, place, checking.result(), progress)
                        checking = None
                    await asyncio.wait({following}, timeout=spec.poll)
    finally:
        for task in (following, checking):
            if task is not None:
                task.cancel()
                with suppress(asyncio.CancelledError, GracefarmError):
                    await task


async def _alive(spec: Spec) -> Nodes:
    """Ray's nodes; nothing where it does not answer just now, which is for the engine to notice."""
    try:
        return await spec.nodes()
    except GracefarmError:
        return {}


def _text(progress: Progress, spec: Spec) -> str:
    left = progress.left(spec.last)
    percent = f" {progress.fraction:.0%}" if progress.fraction is not None else ""
    return f"{progress.phase}{percent}, {progress.elapsed():.0f} s" + (
        f", about {left:.0f} s left" if left is not None else ""
    )


def _tell(console: Console, progress: Progress, spec: Spec, told: str) -> str:
    """One line when a phase begins."""
    if progress.phase != told:
        left = progress.left(spec.last)
        console.step("engine", progress.phase + (f", about {left:.0f} s left" if left is not None else ""))
    return progress.phase


async def _give_up(fleet: Fleet, place: Node, spec: Spec, progress: Progress) -> None:
    await fleet.stop_job(place, paths.ENGINE_JOB)
    raise EngineError(
        f"no completion after {spec.load:g} s; it was {progress.phase} for {progress.elapsed():.0f} s and was stopped",
        remedy="`deploy logs` shows how far it came; load_timeout in [options] where it only needs longer",
    )


async def _lost(fleet: Fleet, place: Node, nodes: Nodes, progress: Progress) -> None:
    dead = [name for name, alive in nodes.items() if not alive]
    if dead:
        await fleet.stop_job(place, paths.ENGINE_JOB)
        raise EngineError(
            f"Ray lost {', '.join(dead)} while the engine was {progress.phase}; the engine was stopped",
            remedy="`deploy preflight` says what that node lacks; `deploy serve` starts Ray there again",
        )


async def _ended(spec: Spec, status: JobStatus, progress: Progress) -> EngineError:
    """Its end as an error with the first cause; where that is no more than a dead worker, with the node that Ray lost."""
    names = {one.private: one.name for one in spec.plan.nodes}
    cause = first_cause(progress.lines, names, returncode=status.returncode)
    how = {"exited": f"ended with {status.returncode}", "stopped": "was stopped by another command"}.get(
        status.state, "was killed"
    )
    if status.state != "exited" and cause.kind == "unknown":
        return EngineError(f"the engine {how} while {progress.phase}", remedy="repeat the command; `deploy logs` shows more")
    dead = await _dead(spec) if cause.consequence else []
    lost = f"Ray lost {', '.join(dead)}; " if dead else ""
    return EngineError(f"the engine {how} while {progress.phase}: {lost}{cause.text}", remedy=cause.remedy)


async def _dead(spec: Spec) -> list[str]:
    """Nodes that Ray has lost; it may take a while to find that out after the engine did."""
    deadline = time.monotonic() + spec.settle
    while True:
        dead = [name for name, alive in (await _alive(spec)).items() if not alive]
        if dead or time.monotonic() > deadline:
            return dead
        await asyncio.sleep(spec.poll)


# a real completion, and what it says


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What became of a completion of one token."""

    kind: Literal["ok", "refused", "timeout", "denied", "error"]
    text: str = ""
    seconds: float = 0.0
    model: str = ""


async def complete(local: int, key: str | None, seconds: float) -> Answer:
    """One token from 127.0.0.1:`local`. Never raises for what the other side does."""
    import httpx  # here: `up` starts without it

    begun, model = time.monotonic(), ""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        async with (
            asyncio.timeout(seconds),
            _client(local, headers, seconds) as client,
        ):
            models = await client.get("/v1/models")
            if models.status_code in (401, 403):
                return Answer(kind="denied", text=f"HTTP {models.status_code}")
            models.raise_for_status()
            model = str(models.json()["data"][0]["id"])
            body = {"model": model, "prompt": "Hello", "max_tokens": 1, "temperature": 0}
            made = await client.post("/v1/completions", json=body)
            made.raise_for_status()
            if not made.json()["choices"]:
                return Answer(kind="error", text="an answer without a choice", model=model)
            return Answer(kind="ok", seconds=time.monotonic() - begun, model=model)
    except (TimeoutError, httpx.TimeoutException):
        return Answer(kind="timeout", text=f"no token within {seconds:g} s", seconds=seconds, model=model)
    except httpx.HTTPStatusError as error:
        return Answer(kind="error", text=f"HTTP {error.response.status_code}: {error.response.text[:200]}".rstrip(": "))
    except httpx.TransportError as error:
        return Answer(kind="refused", text=str(error) or type(error).__name__)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        return Answer(kind="error", text=f"not the answer of an OpenAI server: {error}")


def _client(local: int, headers: Mapping[str, str], seconds: float) -> httpx.AsyncClient:
    import httpx

    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{local}", headers=headers, timeout=seconds, trust_env=False)


async def metrics(local: int, seconds: float = 10) -> dict[str, float] | None:
    """What it counts, as deploy.steps.metrics has it; None: not to be had."""
    found = await engine_metrics.scrape(f"http://127.0.0.1:{local}", seconds)
    return found.model_dump(exclude_none=True) if found else None


# the canary's verdict


Kind = Literal["ready", "degraded", "busy", "loading", "dead-engine", "dead-node", "wedged", "stopped", "unreachable"]


@dataclass(frozen=True, kw_only=True)
class Signs:
    """What was seen of a deployment at one moment."""

    job: JobStatus | None
    "The engine's; None: the head was not reached, see `error`."
    answer: Answer | None = None
    before: Mapping[str, float] | None = None
    "Metrics before the completion was asked for."
    after: Mapping[str, float] | None = None
    nodes: Nodes | None = None
    "None: Ray did not answer."
    phase: str = ""
    "Of loading, as far as its log tells; empty: nothing is known."
    fraction: float | None = None
    "Of the weights, while loading."
    cause: str = ""
    "The first one in its log, where it ended."
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What it is, and what to do."""

    kind: Kind
    text: str
    remedy: str = ""


_AGAIN = "`deploy serve` stops what is left and starts everything again; `deploy collect` first keeps the evidence"


def diagnose(signs: Signs) -> Verdict:
    """Tell a dead engine, a dead node and a wedge apart."""
    if signs.job is None:
        return Verdict(kind="unreachable", text=signs.error or "the head cannot be reached", remedy="`deploy preflight`")
    dead = [name for name, alive in (signs.nodes or {}).items() if not alive]
    if signs.job.state in ("absent", "stopped"):
        return Verdict(kind="stopped", text="the engine does not run", remedy="`deploy serve` starts it")
    if signs.job.state != "running":
        if dead:
            return Verdict(kind="dead-node", text=f"the engine ended after Ray lost {', '.join(dead)}", remedy=_AGAIN)
        how = f"ended with {signs.job.returncode}" if signs.job.state == "exited" else "was killed"
        return Verdict(
            kind="dead-engine", text=f"the engine {how}" + (f": {signs.cause}" if signs.cause else ""), remedy=_AGAIN
        )
    return _of_running(signs, dead)


def _of_running(signs: Signs, dead: list[str]) -> Verdict:
    answer = signs.answer
    if answer and answer.kind == "ok":
        if dead:
            return Verdict(kind="degraded", text=f"it answers, and Ray lost {', '.join(dead)}", remedy=_AGAIN)
        return Verdict(kind="ready", text=f"a completion came back in {answer.seconds:.2f} s")
    if dead:
        return Verdict(kind="dead-node", text=f"Ray lost {', '.join(dead)}; the engine waits for it in vain", remedy=_AGAIN)
    if answer is None or answer.kind == "refused":
        return Verdict(kind="loading", text=f"it does not listen yet{': ' + signs.phase if signs.phase else ''}")
    if moved(signs.before, signs.after):
        return Verdict(kind="busy", text=f"tokens are made for others; the canary waited in vain ({answer.text})")
    ray = "Ray does not answer" if signs.nodes is None else "all nodes are alive"
    if answer.text.startswith("HTTP 5"):  # a worker has died: the next request ends the server, or not even that
        text = f"no completion: {answer.text}; {ray}, and the engine has not ended"
        return Verdict(kind="dead-engine", text=text, remedy=_AGAIN)
    return Verdict(kind="wedged", text=f"{answer.text}, no token was made meanwhile, and {ray}: it hangs", remedy=_AGAIN)


def moved(before: Mapping[str, float] | None, after: Mapping[str, float] | None) -> bool:
    """Tokens were made between two looks at the metrics."""
    name = "generation_tokens_total"
    return bool(before and after and after.get(name, 0) > before.get(name, 0))


async def probe(fleet: Fleet, head: Target, spec: Spec, *, seconds: float = 30) -> Signs:
    """Look at everything that `diagnose` needs, within about `seconds`."""
    (place,) = fleet.pick([head.name])
    try:
        job = await fleet.job_status(place, paths.ENGINE_JOB)
    except GracefarmError as error:
        return Signs(job=None, error=error.cause)
    nodes: Nodes | None
    try:
        nodes = await spec.nodes()
    except GracefarmError:
        nodes = None
    if job.state == "absent":
        return Signs(job=job, nodes=nodes)
    progress = await _read_log(fleet, place)
    if job.state != "running":
        names = {one.private: one.name for one in spec.plan.nodes}
        cause = first_cause(progress.lines, names, returncode=job.returncode).text
        return Signs(job=job, nodes=nodes, cause=cause, phase=progress.phase)
    async with fleet.forward_local(place, 0, "127.0.0.1", port(spec.plan)) as local:
        before = await metrics(local)
        answer = await complete(local, spec.key, seconds)
        after = await metrics(local)
    return Signs(
        job=job, answer=answer, before=before, after=after, nodes=nodes, phase=progress.phase, fraction=progress.fraction
    )


async def _read_log(fleet: Fleet, place: Node) -> Progress:
    log = f"{await fleet.folder(place)}/jobs/{paths.ENGINE_JOB}/log"
    command = f"head -c 4000000 {shlex.quote(log)}"
    progress = Progress()
    for line in (await fleet.run(command, nodes=[place], timeout=60))[place.name].stdout.splitlines():
        progress.feed(line)
    return progress


def by_name(plan: Plan, found: Json) -> dict[str, bool]:
    """deploy.remote.cluster.nodes as `Nodes`: a node that was started again counts by its living part."""
    alive = {one["address"] for one in found["nodes"] if one["alive"]}
    return {one.name: one.private in alive for one in plan.nodes}
