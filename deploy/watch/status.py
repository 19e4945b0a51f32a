"""What a deployment is about, seen now: every node, and the service by a real completion. Changes nothing, locks nothing."""

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
"Seconds until a node that was entered counts as one that does not answer."


class GpuUse(KeptFact):
    """As nvidia-smi has it; None: it does not say."""

    name: str
    used_mib: float | None = None
    total_mib: float | None = None
    busy: float | None = None
    "Percent of the time."
    celsius: float | None = None
    watts: float | None = None


class Disk(KeptFact):
    """Bytes of the file system that holds `path`."""

    path: str
    total: int
    free: int


class Memory(KeptFact):
    """Bytes of the host."""

    total: int
    available: int


class NodeStatus(KeptFact):
    """One node. With `error` nothing else is known."""

    name: str
    address: str
    error: str = ""
    "Why it could not be asked; empty: it answered."
    ray: bool | None = None
    "Ray says that it is alive; None: Ray was not asked or does not answer."
    raylet: bool = False
    "A raylet of ours runs there."
    jobs: tuple[str, ...] = ()
    "Of ours, that have processes there."
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
    """What is served. `word` decides the exit code of `deploy status`."""

    word: Word
    detail: str = ""
    "node or engine of DEAD, the phase of LOADING and FAILED."
    text: str
    remedy: str = ""
    fraction: float | None = None
    "Of the weights, while loading."
    left_s: float | None = None
    "Seconds of loading that are left, by the last start's time."
    canary_s: float | None = None
    "Seconds of a completion of one token."

    @property
    def label(self) -> str:
        """As LOADING(loading 40%) or DEAD(node)."""
        percent = f"{self.fraction:.0%}" if self.fraction is not None else ""
        inner = " ".join(part for part in (self.detail, percent) if part)
        return f"{self.word}({inner})" if inner else self.word


class Status(KeptFact):
    """All of it, at `taken`."""

    taken: float
    deployment: str
    model: str
    plan: str | None = None
    layout: str | None = None
    service: Service
    nodes: tuple[NodeStatus, ...]
    usd_per_hour: float | None = None
    notes: tuple[str, ...] = ()
    "What this machine keeps of the deployment and cannot be read."
    usd_since_boot: float | None = None
    "Of all nodes since each one's boot: what they have cost at least, where they are paid by the hour."


def plan_of(folder: Folder) -> ServePlan | None:
    """The plan that `deploy serve` ran last, if any. Raises ConfigError: it cannot be read."""
    path = folder.path / "plan.json"
    try:
        return ServePlan.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise ConfigError(f"{path}: another version's, or damaged", remedy="`deploy serve` writes it anew") from error


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What is needed to look, again and again."""

    deployment: Deployment
    fleet: Fleet
    facts: Facts | None
    plan: ServePlan | None
    notes: tuple[str, ...] = ()
    "What is kept and cannot be read."

    @property
    def nodes(self) -> list[RemoteNode]:
        """All, the head first."""
        return remote_nodes(self.fleet, self.facts, self.deployment.nodes)

    @property
    def engine_spec(self) -> EngineSpec | None:
        """How the engine and Ray are asked; None: nothing was ever started."""
        if self.plan is None or self.facts is None:
            return None
        cluster = ray.spec_of(self.deployment, self.plan)
        last = kept_or_empty(self.deployment.folder).data("load")
        parts = partial(engine.parts_alive, self.fleet, self.plan) if self.plan.launcher == "native" else None
        return engine.spec_of(self.deployment, self.plan, cluster, self.nodes[0], last, parts)


def watch_of(deployment: Deployment, fleet: Fleet) -> Watch:
    """Of a deployment as it is kept; what is damaged is told, and is no reason not to look."""
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
        notes.append(f"{deployment.folder.facts}: another version's, or damaged; ask again: `deploy facts`")
    return Watch(deployment=deployment, fleet=fleet, facts=facts, plan=plan, notes=tuple(notes))


async def look(watch: Watch, *, canary: float = 30) -> Status:
    """Every node and the service. A node that is not reached is part of the answer. `canary`: seconds for one token."""
    vitals, bad = await vitals_of(watch)
    service, alive = await service_of(watch, vitals, canary)
    return assemble(watch, vitals, bad, service, alive)


async def vitals_of(watch: Watch) -> tuple[dict[str, Json], dict[str, GracefarmError]]:
    """How each node is, and why some did not say."""
    return await try_all(watch.nodes, lambda node: ask_briefly(node, request(watch, node), SILENCE, function="watch.vitals"))


async def service_of(watch: Watch, vitals: Mapping[str, Json], canary: float) -> tuple[Service, Nodes | None]:
    """What is served, and the nodes as Ray sees them."""
    signs = await signs_of(watch, vitals, canary)
    service = judge(signs, kept_or_empty(watch.deployment.folder), planned=watch.plan is not None, now=time.time())
    if watch.notes and service.word in WAITING:  # who knows what was started
        service = Service(word="FAILED", detail="files", text="what this machine keeps of it cannot be read")
    return service, signs.nodes if signs else None


def kept_or_empty(folder: Folder) -> State:
    """The state, or an empty one where it is damaged."""
    try:
        return state.read(folder)
    except ConfigError:
        return State()


def request(watch: Watch, node: RemoteNode) -> Json:
    """Of deploy.remote.watch.vitals."""
    data = watch.deployment.data
    fixed, _, user = data.local.replace("{node}", node.name).partition("{")
    local = posixpath.dirname(fixed) if user else fixed
    return {"prefix": f"{watch.fleet.mark}/{node.name}/", "paths": [*([data.share] if data.share else []), local]}


async def signs_of(watch: Watch, vitals: Mapping[str, Json], canary: float) -> Signs | None:
    """What the canary and Ray say; None: nothing was ever started. Ray is not asked where it does not run."""
    spec = watch.engine_spec
    if spec is None:
        return None
    head, ask = watch.nodes[0], spec.nodes

    if spec.plan.launcher == "native":
        return await probe(watch.fleet, head, spec, seconds=canary)

    async def nodes() -> Nodes:
        if not vitals.get(head.name, {}).get("raylet"):
            raise EngineError("Ray does not run on the head")
        return seen_alive(await ask(), vitals)

    return await probe(watch.fleet, head, replace(spec, nodes=nodes), seconds=canary)


def seen_alive(nodes: Nodes, vitals: Mapping[str, Json]) -> Nodes:
    """Ray's word, and ours: it misses a node only after 15 s, and where no raylet runs we have seen that at once."""
    return {name: alive and bool(vitals.get(name, {}).get("raylet", True)) for name, alive in nodes.items()}


def assemble(
    watch: Watch,
    vitals: Mapping[str, Json],
    bad: Mapping[str, GracefarmError],
    service: Service,
    alive: Nodes | None,
) -> Status:
    """Everything in one value."""
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
    text = redact.of(watch.deployment.folder).line(service.text)  # a line of the engine's log may stand in it
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
    """The canary's verdict and what the state remembers as one word."""
    if signs is None:
        return _at_rest(kept, planned=planned)
    verdict = diagnose(signs)
    ended = verdict.kind in ("dead-engine", "dead-node") and signs.job is not None and signs.job.state != "running"
    if verdict.kind == "stopped" or (ended and "engine" not in kept.steps):  # `deploy down` forgets the engine, dead or not
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
    """No engine: never started, on the way, failed before it, or ended."""
    open_ = {name: record for name, record in kept.steps.items() if record.outcome in ("failed", "running")}
    if open_:
        name = max(open_, key=lambda step: open_[step].begun)
        if open_[name].outcome == "failed":
            again = "serve" if name in order.SERVE else "up"
            return Service(word="FAILED", detail=name, text=open_[name].text, remedy=f"`deploy {again}` tries it again")
        text = f"step {name} was begun and has not ended"
        again = "`deploy serve` waits for it, or goes on from there"
        return Service(word="LOADING", detail=name, text=text, remedy=again)
    if "engine" in kept.steps or (planned and "load" in kept.steps):
        return Service(word="STOPPED", text="the engine does not run", remedy="`deploy serve` starts it")
    return Service(word="PLANNED", text="nothing was started yet", remedy="`deploy serve` starts it")


def _loading(signs: Signs, kept: State, now: float) -> Service:
    last: dict[str, Any] = kept.data("load")
    record = kept.steps.get("engine")
    left = None
    if record and last:
        left = max(0.0, sum(float(seconds) for seconds in last.values()) - (now - record.begun))
    return Service(
        word="LOADING",
        detail=signs.phase or "starting",
        text="it does not listen yet" + (f", about {left:.0f} s left" if left else ""),
        fraction=signs.fraction,
        left_s=round(left, 1) if left is not None else None,
    )
