"""The plan: what runs, where, with which environment. What it prints is what `deploy serve` executes, argument by argument."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Literal

from pydantic import BaseModel, ConfigDict, PositiveInt

from deploy.nodes.deployment import Deployment
from deploy.nodes.facts import Facts, NodeFacts
from deploy.planning import choosing, commands, engines, hardware, layouts, links
from deploy.planning.engines import Engine
from deploy.planning.layouts import (
    BATCHED,
    Candidate,
    Layout,
    LayoutChoice,
    Machine,
    MemoryPlan,
    Question,
    Rejected,
)
from deploy.planning.shapes import BYTES, Model
from deploy.planning.shards import GIB
from deploy.planning.speed import Prediction
from gracefarm.errors import ConfigError, LayoutError

REHEARSED = "gh200-96"
"What the nodes of a rehearsal are taken for: their GPUs are declared, not found."
FREE = 0.95
"Of a GPU's memory: with less, somebody uses it."


RUNS = {"deployment", "engine", "launcher", "model", "revision", "layout", "nodes", "serve", "serve_env", "secret_env"}
"Fields of a plan that are executed; the others say what to expect of it: a price, a better prediction, a spare."
LATER: Mapping[str, object] = MappingProxyType({"dp": 1, "expert_parallel": False, "local_replicas": 1, "spans": False})
"Fields of a layout that came later, and what layouts were before."


class NodePlan(BaseModel):
    """The part of one node, with the exact command that starts Ray or the engine there."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str
    "Name of the node."
    address: str
    "Address for ssh."
    private: str
    "Address for the other nodes: Ray's node address and the engine's host address."
    interface: str
    "Network interface of the private address."
    gpus: PositiveInt
    "Number of GPUs that Ray uses; tp * pp of the plan in total."
    env: Mapping[str, str]
    "Environment of `ray start` and of Ray's workers, or of the engine there."
    ray: tuple[str, ...] = ()
    "Arguments of `ray start`; empty with `launcher = native`."
    engine: tuple[str, ...] = ()
    "Arguments of the engine on a node that is not the head, with `launcher = native`."


class Alternative(BaseModel):
    """Another layout that fits these nodes: the best one for its tp."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    layout: str
    "Name of the layout."
    partition: tuple[int, ...]
    "Layers of each stage."
    offload_gib: float
    "Weights in host memory per GPU."
    weights_gib: float
    "Weights on the fullest GPU."
    request_tokens: int
    "Tokens of the longest possible request."
    tokens_per_s: float
    "Predicted tokens/s of one stream."
    usd_per_mtok: float | None
    "Predicted dollars per million tokens; None without a price."


class ServePlan(BaseModel):
    """The plan of a deployment. The id depends on everything that is executed, not on predictions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    id: str = ""
    "sha256 over the executed fields (RUNS) as canonical JSON. The engine stores it (plan_mark); another id reloads the model."
    deployment: str
    "Name of the deployment."
    engine: Literal["aphrodite", "vllm"]
    "The engine."
    launcher: Literal["ray", "native"] = "ray"
    "What connects the engine's nodes."
    model: str
    "Repository on the Hub."
    revision: str
    "Commit, or a branch that is not resolved yet."
    layout: Layout
    "How the model is split."
    nodes: tuple[NodePlan, ...]
    "Nodes in the engine's rank order, the head first."
    spares: tuple[str, ...] = ()
    "Names of nodes that Ray must not use."
    serve: tuple[str, ...]
    "Arguments of the engine, which runs on the head and listens on 127.0.0.1."
    serve_env: Mapping[str, str]
    "Environment of the engine, in addition to that of the login."
    secret_env: tuple[str, ...]
    "Names of secret variables; `deploy serve` passes their values on stdin."
    memory: MemoryPlan | None
    "Memory; None for a model that the planner does not know."
    prediction: Prediction | None
    "Predicted speed; None: the planner does not know the model."
    alternatives: tuple[Alternative, ...] = ()
    "Other possible layouts."
    rejected: tuple[Rejected, ...] = ()
    "Layouts that do not fit."
    notes: tuple[str, ...] = ()
    "Remarks for the user, such as nodes that cannot serve, and assumptions."

    @property
    def head(self) -> NodePlan:
        """Where Ray's head and the engine's driver run."""
        return self.nodes[0]

    @property
    def followers(self) -> tuple[NodePlan, ...]:
        """Nodes with a part of the engine that is started there; with Ray there are none."""
        return self.nodes[1:] if self.launcher == "native" else ()

    def lost(self, names: Sequence[str]) -> str:
        """A sentence for nodes that the engine has lost."""
        return f"Ray lost {', '.join(names)}" if self.launcher == "ray" else f"its part on {', '.join(names)} has ended"


def identified(plan: ServePlan) -> ServePlan:
    """The plan with its id. What earlier versions did not know is left out where it is as they had it: their ids stay."""
    runs = plan.model_dump(mode="json", include=RUNS)
    for name, before in LATER.items():
        if runs["layout"][name] == before:
            del runs["layout"][name]
    if plan.launcher == "ray":
        del runs["launcher"]
        for node in runs["nodes"]:
            del node["engine"]
    text = json.dumps(runs, sort_keys=True, separators=(",", ":"))
    return plan.model_copy(update={"id": hashlib.sha256(text.encode()).hexdigest()})


def plan_mark(plan: ServePlan, environment: str) -> str:
    """What every process of a plan carries: the plan's id and the environment's, which arguments name by a link that moves."""
    return hashlib.sha256(f"{plan.id} {environment}".encode()).hexdigest() if environment else plan.id


def make(deployment: Deployment, facts: Facts, model: Model) -> ServePlan:
    """The plan for these nodes and this model.

    Raises:
        LayoutError: the model does not fit, or not in the layout that deploy.toml forces.
        ConfigError: deploy.toml asks for what the engine does not have, or a node was never asked.
    """
    question, notes = _question(deployment, facts, model)
    choice = choosing.choose(question)
    best = choice.best
    places = [slot.machine.name for slot in best.slots]
    plan = _executed(deployment, facts, best.layout, places, model.repo, model.revision)
    unused = [machine.name for machine in question.machines if machine.name not in {node.name for node in plan.nodes}]
    return identified(
        plan.model_copy(
            update={
                "spares": tuple(unused),
                "memory": best.memory,
                "prediction": best.prediction,
                "alternatives": _alternatives(choice),
                "rejected": choice.rejected,
                "notes": (*notes, *_notes(question, best, facts), *_unused(question, unused, len(plan.nodes))),
            }
        )
    )


def _machines(deployment: Deployment, known: Mapping[str, NodeFacts]) -> tuple[tuple[Machine, ...], list[str]]:
    """What each node has to offer, and of those that offer nothing why."""
    machines, notes = [], []
    for node in deployment.nodes:
        facts = known[node.name]
        if deployment.data.options.rehearsal:
            kind = hardware.kinds()[REHEARSED]
            machine = layouts.machines_of(kind, 1)[0]
            declared = machine.gpus[:1] * (node.gpus or 1)
            machines.append(Machine(name=node.name, private=facts.private, gpus=declared, host=machine.host))
            continue
        gpus = facts.cuda.gpus
        if node.gpus is not None and node.gpus > len(gpus):
            raise LayoutError(
                f"{node}: deploy.toml says {node.gpus} GPUs, and it has {len(gpus)}",
                remedy="correct gpus, or replace the node",
            )
        if gpus:
            machines.append(Machine(name=node.name, private=facts.private, gpus=gpus[: node.gpus], host=facts.memory.total))
        elif node.head:
            raise LayoutError(
                f"{node}: the head has no usable GPU ({facts.cuda.text}), and the engine's driver needs one",
                remedy="put a node with a GPU first, or mend its driver and ask again: `deploy facts`",
            )
        else:
            notes.append(f"{node} cannot serve: {facts.cuda.text}")
    return tuple(machines), notes


def _question(deployment: Deployment, facts: Facts, model: Model) -> tuple[Question, list[str]]:
    """What is to be planned, and what a person should know of the nodes."""
    data = deployment.data
    engine = engines.engine(data.engine)
    known = {node.name: facts.node(node.name) for node in deployment.nodes}
    engines.check(engine, data.engine_options, known[deployment.head.name].arch)
    machines, notes = _machines(deployment, known)
    serving = [known[machine.name] for machine in machines]
    cache = str(data.engine_options.get("kv-cache-dtype", data.engine_options.get("kv_cache_dtype", "auto")))
    question = Question(
        engine=engine,
        model=model,
        machines=machines,
        forced=data.layout,
        price=data.options.price_per_node_hour,
        link=links.link(serving),
        cache_bytes=1 if cache.startswith("fp8") else BYTES,
    )
    return question, [*notes, *links.notes(serving)]


def trusted(deployment: Deployment, facts: Facts, repo: str, revision: str) -> ServePlan:
    """The plan for a model that the planner does not know, as [layout] says: nothing is predicted.

    Raises:
        ConfigError: tensor_parallel or pipeline_parallel is missing. LayoutError: there are not so many GPUs.
    """
    data, forced = deployment.data, deployment.data.layout
    if not (forced.tensor_parallel and forced.pipeline_parallel):
        raise ConfigError(
            "[layout] trust serves a model that the planner does not know; tensor_parallel or pipeline_parallel is missing",
            remedy="set both: their product is the number of GPUs",
        )
    engine = engines.engine(data.engine)
    known = {node.name: facts.node(node.name) for node in deployment.nodes}
    engines.check(engine, data.engine_options, known[deployment.head.name].arch)
    machines, notes = _machines(deployment, known)
    layout = Layout(
        tp=forced.tensor_parallel,
        pp=forced.pipeline_parallel,
        partition=forced.partition or (),
        offload_gib=forced.cpu_offload_gib or 0,
        max_model_len=forced.max_model_len,
        max_num_seqs=forced.max_num_seqs,
        max_num_batched_tokens=BATCHED,
        gmu=forced.gpu_memory_utilization,
        dp=forced.data_parallel or 1,
        expert_parallel=forced.expert_parallel or False,
    )
    there = sum(len(machine.gpus) for machine in machines)
    if layout.world > there:
        raise LayoutError(
            f"{layout.name} needs {layout.world} GPUs, and there are {there}", remedy="fewer stages or ranks, or more nodes"
        )
    each = len(machines[0].gpus) // (layout.tp * layout.pp)
    layout = layout.model_copy(update={"local_replicas": max(1, min(layout.dp, each)), "spans": layout.dp > 1 and each == 0})
    slots = layouts.place(machines, layout.world)
    plan = _executed(deployment, facts, layout, [slot.machine.name for slot in slots], repo, revision)
    unused = [machine.name for machine in machines if machine.name not in {node.name for node in plan.nodes}]
    doubt = f"the planner does not know {repo}: [layout] trust serves it without a prediction of memory and speed"
    return identified(plan.model_copy(update={"spares": tuple(unused), "notes": (*notes, doubt)}))


def _executed(
    deployment: Deployment, facts: Facts, layout: Layout, places: Sequence[str], repo: str, revision: str
) -> ServePlan:
    """What runs: the nodes in the engine's rank order, one name for each GPU."""
    engine, head = engines.engine(deployment.data.engine), facts.node(deployment.head.name)
    nodes = tuple(_node(deployment, engine, layout, facts.node(name), count, head) for name, count in Counter(places).items())
    serve = commands.serve(deployment, engine, layout, repo, revision)
    if deployment.data.launcher == "native":
        _require_native(engine, layout, nodes)
        parts = [
            commands.native(serve, deployment.data.ports.store, rank, len(nodes), head.private) for rank in range(len(nodes))
        ]
        followers = (node.model_copy(update={"engine": part}) for node, part in zip(nodes[1:], parts[1:], strict=True))
        serve, nodes = parts[0], (nodes[0], *followers)
    return ServePlan(
        deployment=deployment.data.name,
        engine=deployment.data.engine,
        launcher=deployment.data.launcher,
        model=repo,
        revision=revision,
        layout=layout,
        nodes=nodes,
        serve=serve,
        serve_env=commands.serve_env(deployment, engine, layout, nodes[0].private, nodes[0].env),
        secret_env=(engine.key_variable,),
        memory=None,
        prediction=None,
    )


def _require_native(engine: Engine, layout: Layout, nodes: Sequence[NodePlan]) -> None:
    """The engine starts itself on these nodes. Raises ConfigError, LayoutError: it cannot."""
    if not engine.native:
        raise ConfigError(f'launcher = "native": {engine.name} has no start of several nodes', remedy='launcher = "ray"')
    if layout.dp > 1:
        raise LayoutError(
            f"{layout.name}: replicas on several nodes are brought together by Ray",
            remedy='launcher = "ray", or a deployment for each replica',
        )
    if len({node.gpus for node in nodes}) > 1:
        each = ", ".join(f"{node.name} {node.gpus}" for node in nodes)
        raise LayoutError(
            f"without Ray every node has the same number of ranks, and the plan has {each}", remedy='launcher = "ray"'
        )


def _node(deployment: Deployment, engine: Engine, layout: Layout, facts: NodeFacts, gpus: int, head: NodeFacts) -> NodePlan:
    node = deployment.node(facts.name)
    return NodePlan(
        name=node.name,
        address=node.address,
        private=facts.private,
        interface=facts.interface,
        gpus=gpus,
        env=commands.node_env(deployment, engine, layout, facts, node),
        ray=commands.ray_command(deployment, facts, node, gpus, head) if deployment.data.launcher == "ray" else (),
    )


def _notes(question: Question, best: Candidate, facts: Facts) -> list[str]:
    notes, model = [], question.model
    if not model.pinned:
        notes.append(
            f"{model.repo} at {model.revision!r} is not pinned yet: `deploy up` resolves it to a commit, which changes the id"
        )
    if model.vision and model.stored is None:
        notes.append(
            "its part for images is not counted: config.json does not give its bytes; the files do, once they are there"
        )
    names = {slot.gpu.name for slot in best.slots if hardware.kind_of(slot.gpu.name) is hardware.UNKNOWN}
    notes += [f"the speed model does not know {name}: its figures are guesses" for name in sorted(names)]
    kinds = sorted({slot.gpu.name for slot in best.slots})
    if len(kinds) > 1:
        notes.append(f"the GPUs differ ({', '.join(kinds)}): of each stage the smallest and the slowest counts")
    networks = sorted({facts.node(slot.machine.name).network for slot in best.slots})
    if len(networks) > 1:
        notes.append(f"the private addresses are in {len(networks)} networks ({', '.join(networks)}): set private or nic")
    return notes


def _unused(question: Question, unused: Sequence[str], used: int) -> list[str]:
    """Nodes that cost and bring nothing."""
    if not unused:
        return []
    which = unused[0] if len(unused) == 1 else f"{unused[0]} to {unused[-1]}"
    serving = "1 node serves" if used == 1 else f"{used} nodes serve"
    idle = "1 does not" if len(unused) == 1 else f"{len(unused)} do not"
    if question.objective == "throughput" and (question.model.experts or not question.engine.replicas):
        whose = "models with experts" if question.model.experts else question.engine.name
        return [f"{serving}, {idle} ({which}): no replicas of {whose} are planned; another deployment can use them"]
    what = {"speed": "one stream", "throughput": "all streams together", "cost": "a token"}[question.objective]
    better = "cheaper" if question.objective == "cost" else "faster"
    return [f"{serving}, {idle} ({which}): with all, {what} would not be noticeably {better}"]


def cautions(facts: Facts) -> tuple[str, ...]:
    """GPUs that were in use when the nodes were asked. Not part of a plan: it must not change while it runs."""
    sentences = []
    for node in facts.nodes:
        fullest = min(node.cuda.gpus, key=lambda gpu: gpu.free / gpu.total, default=None)
        if fullest and fullest.free < FREE * fullest.total:
            free = f"{fullest.free / GIB:.1f} of {fullest.total / GIB:.1f} GiB"
            sentences.append(f"{node.name}: {free} of GPU memory were free when it was asked; `deploy preflight` looks again")
    return tuple(sentences)


def _alternatives(choice: LayoutChoice) -> tuple[Alternative, ...]:
    """The best layout of every other tp."""
    best: dict[int, Candidate] = {}
    for candidate in choice.others:
        best.setdefault(candidate.layout.tp, candidate)
    best.pop(choice.best.layout.tp, None)
    return tuple(
        Alternative(
            layout=candidate.layout.name,
            partition=candidate.layout.partition,
            offload_gib=candidate.layout.offload_gib,
            weights_gib=candidate.memory.weights_gib,
            request_tokens=candidate.memory.request_tokens,
            tokens_per_s=candidate.prediction.tokens_per_s,
            usd_per_mtok=candidate.prediction.usd_per_mtok,
        )
        for candidate in best.values()
    )


def ranks(plan: ServePlan) -> tuple[tuple[str, ...], ...]:
    """Node names of each stage's ranks."""
    order = [node.name for node in plan.nodes for _ in range(node.gpus)]
    return tuple(tuple(order[stage * plan.layout.tp : (stage + 1) * plan.layout.tp]) for stage in range(plan.layout.pp))
