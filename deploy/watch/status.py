"""The current state of a deployment: every node, and the service by a real completion. Nothing is changed or locked."""

from __future__ import annotations

import posixpath
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, cast

from pydantic import ValidationError

from deploy.fleet.calls import RemoteNode
from deploy.fleet.results import try_all
from deploy.fleet.shells import remote_nodes
from deploy.fleet.ssh import Fleet
from deploy.nodes import redact, state
from deploy.nodes.deployment import Deployment, Folder
from deploy.nodes.facts import Facts, KeptFact, load_facts
from deploy.nodes.state import State
from deploy.planning.plans import ServePlan
from deploy.remote.wire import Json
from deploy.steps import engine, order, ray
from deploy.steps.engine import EngineSpec, Nodes
from deploy.steps.step import ask_briefly
from deploy.watch.verdict import Diagnosis, Signs, diagnose, probe
from gracefarm.errors import ConfigError, EngineError, GracefarmError

Word = Literal["PLANNED", "LOADING", "READY", "BUSY", "DEGRADED", "WEDGED", "DEAD", "STOPPED", "FAILED", "UNREACHABLE"]
SERVING: tuple[Word, ...] = ("READY", "BUSY")
WAITING: tuple[Word, ...] = ("PLANNED", "LOADING", "STOPPED")
SILENCE = 30.0
"Timeout in seconds for the answer of a node."


class GpuUse(KeptFact):
    """A GPU in nvidia-smi. None: not reported."""

    name: str
    used_mib: float | None = None
    total_mib: float | None = None
    busy: float | None = None
    "Percent of the time."
    celsius: float | None = None
    watts: float | None = None


class Disk(KeptFact):
    """Bytes of the file system of `path`."""

    path: str
    total: int
    free: int


class Memory(KeptFact):
    """Bytes of host memory."""

    total: int
    available: int


class NodeStatus(KeptFact):
    """The state of one node. With `error`, the other fields are unknown."""

    name: str
    address: str
    error: str = ""
    "Why the node did not answer; empty: it answered."
    ray: bool | None = None
    "Whether the node is alive according to Ray; None: Ray was not asked or does not answer."
    raylet: bool = False
    "Our raylet runs on the node."
    jobs: tuple[str, ...] = ()
    "Our jobs that are running on the node."
    gpus: tuple[GpuUse, ...] = ()
    gpu_error: str = ""
    disks: tuple[Disk, ...] = ()
    stuck: tuple[str, ...] = ()
    "Folders whose file system does not answer."
    memory: Memory | None = None
    cores: int = 0
    load: float = 0.0
    uptime: float = 0.0
    "Seconds since its boot."


class Service(KeptFact):
    """The state of the service. `word` determines the exit code of `deploy status`."""

    word: Word
    detail: str = ""
    "`node` or `engine` for DEAD, the phase for LOADING and FAILED."
    text: str
    remedy: str = ""
    fraction: float | None = None
    "Share of the weights that is loaded."
    left_s: float | None = None
    "Estimated seconds until loading ends, from the last start."
    canary_s: float | None = None
    "Seconds of a completion of one token."

    @property
    def label(self) -> str:
        """Such as LOADING(loading 40%) or DEAD(node)."""
        percent = f"{self.fraction:.0%}" if self.fraction is not None else ""
        inner = " ".join(part for part in (self.detail, percent) if part)
        return f"{self.word}({inner})" if inner else self.word


class Status(KeptFact):
    """The state of a deployment at the time `taken`."""

    taken: float
    deployment: str
    model: str
    plan: str | None = None
    layout: str | None = None
    service: Service
    nodes: tuple[NodeStatus, ...]
    usd_per_hour: float | None = None
    notes: tuple[str, ...] = ()
    "Files of the deployment on this machine that cannot be read."
    usd_since_boot: float | None = None
    "Cost of all nodes since they were booted: the minimum cost if they are paid by the hour."


def plan_of(folder: Folder) -> ServePlan | None:
    """The plan that `deploy serve` executed last, or None. Raises ConfigError if it cannot be read."""
    path = folder.path / "plan.json"
    try:
        return ServePlan.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise ConfigError(
            f"{path} is damaged or was written by a different version of gracefarm",
            remedy="run `deploy serve`, which replaces it",
        ) from error


@dataclass(frozen=True, kw_only=True)
class Watch:
    """A deployment that is observed."""

    deployment: Deployment
    fleet: Fleet
    facts: Facts | None
    plan: ServePlan | None
    notes: tuple[str, ...] = ()
    "Files that cannot be read."

    @property
    def nodes(self) -> list[RemoteNode]:
        """All nodes, the head first."""
        return remote_nodes(self.fleet, self.facts, self.deployment.nodes)

    @property
    def engine_spec(self) -> EngineSpec | None:
        """The engine and its nodes; None if nothing was ever started."""
        if self.plan is None or self.facts is None:
            return None
        cluster = ray.spec_of(self.deployment, self.plan)
        last = kept_or_empty(self.deployment.folder).data("load")
        parts = partial(engine.parts_alive, self.fleet, self.plan) if self.plan.launcher == "native" else None
        return engine.spec_of(self.deployment, self.plan, cluster, self.nodes[0], last, parts)


def watch_of(deployment: Deployment, fleet: Fleet) -> Watch:
    """The Watch of a deployment. Damaged files give notes, not errors."""
    notes: list[str] = []
    plan, facts = None, None
    with suppress(ConfigError):
        facts = load_facts(deployment)
    try:
        state.read(deployment.folder)
    except ConfigError as error:
        notes.append(f"{error.cause}; {error.remedy}")
    try:
        plan = plan_of(deployment.folder)
    except ConfigError as error:
        notes.append(f"{error.cause}; {error.remedy}")
    if facts is None and deployment.folder.facts.exists():
        notes.append(
            f"{deployment.folder.facts} is damaged or was written by a different version; collect the facts again with "
            "`deploy facts`"
        )
    return Watch(deployment=deployment, fleet=fleet, facts=facts, plan=plan, notes=tuple(notes))


async def look(watch: Watch, *, canary: float = 30) -> Status:
    """The status of every node, reachable or not, and of the service. `canary`: maximum seconds for one token."""
    vitals, bad = await vitals_of(watch)
    service, alive = await service_of(watch, vitals, canary)
    return assemble(watch, vitals, bad, service, alive)


async def vitals_of(watch: Watch) -> tuple[dict[str, Json], dict[str, GracefarmError]]:
    """The state of each node, and the errors of nodes that did not answer."""
    return await try_all(watch.nodes, lambda node: ask_briefly(node, request(watch, node), SILENCE, function="watch.vitals"))


async def service_of(watch: Watch, vitals: Mapping[str, Json], canary: float) -> tuple[Service, Nodes | None]:
    """The state of the service, and of the nodes according to Ray."""
    signs = await signs_of(watch, vitals, canary)
    service = judge(signs, kept_or_empty(watch.deployment.folder), planned=watch.plan is not None, now=time.time())
    if watch.notes and service.word in WAITING:  # it is unknown what was started
        service = Service(word="FAILED", detail="files", text="files of this deployment cannot be read")
    return service, signs.nodes if signs else None


def kept_or_empty(folder: Folder) -> State:
    """The state, or an empty one if it is damaged."""
    try:
        return state.read(folder)
    except ConfigError:
        return State()


def request(watch: Watch, node: RemoteNode) -> Json:
    """The request for deploy.remote.watch.vitals."""
    data = watch.deployment.data
    fixed, _, user = data.local.replace("{node}", node.name).partition("{")
    local = posixpath.dirname(fixed) if user else fixed
    return {"prefix": f"{watch.fleet.mark}/{node.name}/", "paths": [*([data.share] if data.share else []), local]}


async def signs_of(watch: Watch, vitals: Mapping[str, Json], canary: float) -> Signs | None:
    """Observations with a completion and Ray; None if nothing was ever started. Ray is asked only if it runs."""
    spec = watch.engine_spec
    if spec is None:
        return None
    head, ask = watch.nodes[0], spec.nodes

    if spec.plan.launcher == "native":
        return await probe(watch.fleet, head, spec, seconds=canary)

    async def nodes() -> Nodes:
        if not vitals.get(head.name, {}).get("raylet"):
            raise EngineError("Ray is not running on the head (the first node)")
        return seen_alive(await ask(), vitals)

    return await probe(watch.fleet, head, replace(spec, nodes=nodes), seconds=canary)


def seen_alive(nodes: Nodes, vitals: Mapping[str, Json]) -> Nodes:
    """Nodes that are alive according to Ray and have a raylet. Ray notices a lost node only after 15 s."""
    return {name: alive and bool(vitals.get(name, {}).get("raylet", True)) for name, alive in nodes.items()}


def assemble(
    watch: Watch,
    vitals: Mapping[str, Json],
    bad: Mapping[str, GracefarmError],
    service: Service,
    alive: Nodes | None,
) -> Status:
    """Put everything into one Status."""
    nodes = tuple(
        NodeStatus.model_validate(
            {
                "name": node.name,
                "address": node.address,
                "error": bad[node.name].cause if node.name in bad else "",
                "ray": alive.get(node.name) if alive and watch.plan and watch.plan.launcher == "ray" else None,
                **vitals.get(node.name, {}),
            }
        )
        for node in watch.deployment.nodes
    )
    price = watch.deployment.data.options.price_per_node_hour
    text = redact.of(watch.deployment.folder).line(service.text)  # the text may contain a line of the engine's log
    return Status(
        taken=time.time(),
        deployment=watch.deployment.name,
        model=watch.deployment.data.model.repo,
        plan=watch.plan.id if watch.plan else None,
        layout=watch.plan.layout.name if watch.plan else None,
        service=service.model_copy(update={"text": text}),
        nodes=nodes,
        notes=watch.notes,
        usd_per_hour=round(price * len(nodes), 2) if price is not None else None,
        usd_since_boot=round(price * sum(node.uptime for node in nodes) / 3600, 2) if price is not None else None,
    )


def judge(signs: Signs | None, kept: State, *, planned: bool, now: float) -> Service:
    """The state of the service, from the observations and the stored state."""
    if signs is None:
        return _at_rest(kept, planned=planned)
    verdict = diagnose(signs)
    ended = verdict.kind in ("dead-engine", "dead-node") and signs.job is not None and signs.job.state != "running"
    if verdict.kind == "stopped" or (ended and "engine" not in kept.steps):  # `deploy down` removes the engine from the state
        return _at_rest(kept, planned=planned)
    if verdict.kind == "loading":
        return _loading(signs, kept, now)
    if verdict.kind == "dead-engine" and signs.phase and signs.phase != "listening":
        return Service(word="FAILED", detail=signs.phase, text=verdict.text, remedy=verdict.remedy)
    return _of(verdict, signs)


def _of(verdict: Diagnosis, signs: Signs) -> Service:
    word, _, detail = verdict.kind.partition("-")  # dead-node is DEAD(node)
    seconds = signs.answer.seconds if signs.answer and signs.answer.kind == "ok" else None
    kind = cast("Word", word.upper())
    return Service(word=kind, detail=detail, text=verdict.text, remedy=verdict.remedy, canary_s=seconds)


def _at_rest(kept: State, *, planned: bool) -> Service:
    """The state without an engine: never started, in preparation, failed, or stopped."""
    open_ = {name: record for name, record in kept.steps.items() if record.outcome in ("failed", "running")}
    if open_:
        name = max(open_, key=lambda step: open_[step].begun)
        if open_[name].outcome == "failed":
            again = "serve" if name in order.SERVE else "up"
            return Service(word="FAILED", detail=name, text=open_[name].text, remedy=f"repeat `deploy {again}`")
        text = f"step {name} has started but not ended"
        again = "wait; if no command is running, continue with `deploy serve`"
        return Service(word="LOADING", detail=name, text=text, remedy=again)
    if "engine" in kept.steps or (planned and "load" in kept.steps):
        return Service(word="STOPPED", text="the engine is not running", remedy="start the engine with `deploy serve`")
    return Service(word="PLANNED", text="nothing was started yet", remedy="start the engine with `deploy serve`")


def _loading(signs: Signs, kept: State, now: float) -> Service:
    last: dict[str, Any] = kept.data("load")
    record = kept.steps.get("engine")
    left = None
    if record and last:
        left = max(0.0, sum(float(seconds) for seconds in last.values()) - (now - record.begun))
    return Service(
        word="LOADING",
        detail=signs.phase or "starting",
        text="the engine does not listen yet" + (f", about {left:.0f} s left" if left else ""),
        fraction=signs.fraction,
        left_s=round(left, 1) if left is not None else None,
    )
