"""The plan: which commands run where, with which environment. `deploy serve` executes exactly the printed commands."""

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
from deploy.planning import choosing, commands, engines, hardware, links, placement
from deploy.planning.engines import Engine
from deploy.planning.layouts import (
    BATCHED,
    Candidate,
    Layout,
    LayoutChoice,
    MemoryPlan,
    Question,
    Rejected,
)
from deploy.planning.placement import Machine
from deploy.planning.shapes import BYTES, Model
from deploy.planning.shards import GIB
from deploy.planning.speed import Prediction
from gracefarm.errors import ConfigError, LayoutError

REHEARSED = "gh200-96"
"Kind of the nodes of a rehearsal, whose GPUs are declared, not found."
FREE = 0.95
"Share of a GPU's memory. If less is free, the GPU is in use."


RUNS = {"deployment", "engine", "launcher", "model", "revision", "layout", "nodes", "serve", "serve_env", "secret_env"}
"Fields of a plan that determine what is executed. The others are predictions, prices, spares and notes."
LATER: Mapping[str, object] = MappingProxyType({"dp": 1, "expert_parallel": False, "local_replicas": 1, "spans": False})
"Fields of a layout that later versions added, with the values that give the same layout as before."


class NodePlan(BaseModel):
    """What the plan sets for one node: its addresses, its GPUs, and the commands that run there."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str
    "Name of the node."
    address: str
    "Address for SSH."
    private: str
    "Address at which the other nodes reach this node. Ray and the engine use it."
    interface: str
    "Network interface with the address in `private`."
    gpus: PositiveInt
    "Number of GPUs that the engine uses on this node. The sum over all nodes is tp * pp * dp."
    env: Mapping[str, str]
    (
        "Environment variables. If `launcher` is `ray`, they are set for `ray start`. If it is `native`, they are set for "
        "the engine."
    )
    ray: tuple[str, ...] = ()
    "Command that starts Ray on the node. Empty: `launcher` is `native`."
    engine: tuple[str, ...] = ()
    "Command that starts the engine on the node. Empty: `launcher` is `ray`, or the node is the head."


class Alternative(BaseModel):
    """Another layout that fits on the nodes. It is the best of the layouts with the same `tp`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    layout: str
    "Name of the layout, for example `tp4 pp2`."
    partition: tuple[int, ...]
    "Number of layers of each stage."
    offload_gib: float
    "GiB of offloaded weights of each GPU."
    weights_gib: float
    "GiB of weights of the GPU with the most weights."
    request_tokens: int
    "Number of tokens of the longest possible request."
    tokens_per_s: float
    "Predicted tokens/s of one stream."
    usd_per_mtok: float | None
    "Predicted dollars per million tokens with one stream. null: the price of a GPU is unknown."


class ServePlan(BaseModel):
    """The plan of a deployment. The id depends on everything that is executed, not on predictions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    id: str = ""
    (
        "Digest of everything in the plan that is executed. Prices, predictions and notes do not change the id. If the id "
        "changes, `deploy serve` starts the engine again."
    )
    deployment: str
    "Name of the deployment."
    engine: Literal["aphrodite", "vllm"]
    "Program that runs the model."
    launcher: Literal["ray", "native"] = "ray"
    (
        "Program that connects several nodes. `ray`: Ray connects the nodes, and starts the engine's processes on them. "
        "`native`: `deploy` starts the engine on each node, and the engine connects the nodes itself."
    )
    model: str
    "Repository on the Hugging Face Hub."
    revision: str
    "Commit of the model. Before `deploy up`, it can be a branch or tag."
    layout: Layout
    "Division of the model over the GPUs."
    nodes: tuple[NodePlan, ...]
    "Nodes that run the engine. The head is the first node."
    spares: tuple[str, ...] = ()
    "Names of nodes that the plan does not use."
    serve: tuple[str, ...]
    "Command that starts the engine on the head. The engine listens on 127.0.0.1."
    serve_env: Mapping[str, str]
    "Environment variables for the command in `serve`. The command also has the variables of the SSH session."
    secret_env: tuple[str, ...]
    (
        "Names of environment variables with secrets. The plan does not have their values. `deploy serve` sends them to the "
        "head through standard input."
    )
    memory: MemoryPlan | None
    "Predicted use of memory. null: the planner does not know the model."
    prediction: Prediction | None
    "Predicted speed. null: the planner does not know the model."
    alternatives: tuple[Alternative, ...] = ()
    "Other layouts that fit."
    rejected: tuple[Rejected, ...] = ()
    "Layouts that do not fit."
    notes: tuple[str, ...] = ()
    "Notes for the user, for example about nodes that cannot be used."

    @property
    def head(self) -> NodePlan:
        """The node that runs Ray's head and the engine's main process."""
        return self.nodes[0]

    @property
    def followers(self) -> tuple[NodePlan, ...]:
        """Nodes on which the engine is started in addition to the head; none with Ray."""
        return self.nodes[1:] if self.launcher == "native" else ()

    def lost(self, names: Sequence[str]) -> str:
        """A phrase for nodes that the engine has lost."""
        return f"Ray lost {', '.join(names)}" if self.launcher == "ray" else f"the engine on {', '.join(names)} has ended"


def identified(plan: ServePlan) -> ServePlan:
    """The plan with its id. Newer fields with their old value are left out, so that old plans keep their ids."""
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
    """The mark of all processes of a plan: a hash of the plan's id and the environment's id.

    The arguments contain only the link to the active environment, whose target may change.
    """
    return hashlib.sha256(f"{plan.id} {environment}".encode()).hexdigest() if environment else plan.id


def make(deployment: Deployment, facts: Facts, model: Model) -> ServePlan:
    """Make the plan for these nodes and this model.

    Raises:
        LayoutError: the model does not fit, or not in the layout of deploy.toml.
        ConfigError: the engine does not have an option of deploy.toml, or the facts of a node are missing.
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
                "notes": (
                    *notes,
                    *_notes(question, best, facts),
                    *_unused(question, best, unused),
                    *_separate(question, choice),
                ),
            }
        )
    )


def _machines(deployment: Deployment, known: Mapping[str, NodeFacts]) -> tuple[tuple[Machine, ...], list[str]]:
    """The GPUs and memory of each node, and a note for each node that cannot serve."""
    machines, notes = [], []
    for node in deployment.nodes:
        facts = known[node.name]
        if deployment.data.options.rehearsal:
            kind = hardware.kinds()[REHEARSED]
            machine = placement.machines_of(kind, 1)[0]
            declared = machine.gpus[:1] * (node.gpus or 1)
            machines.append(Machine(name=node.name, private=facts.private, gpus=declared, host=machine.host))
            continue
        gpus = facts.cuda.gpus
        if node.gpus is not None and node.gpus > len(gpus):
            raise LayoutError(
                f"{node}: gpus is {node.gpus} in deploy.toml, but the node has {len(gpus)} GPUs",
                remedy="correct gpus in deploy.toml, or replace the node",
            )
        if gpus:
            machines.append(Machine(name=node.name, private=facts.private, gpus=gpus[: node.gpus], host=facts.memory.total))
        elif node.head:
            raise LayoutError(
                f"{node}: the head has no usable GPU ({facts.cuda.text}), but the engine's main process runs there "
                "and requires one",
                remedy=f"put a node with a GPU in the first place in {_list(deployment)}, or repair the NVIDIA driver of this "
                "node; then run `deploy facts`",
            )
        else:
            notes.append(f"{node} cannot serve: {facts.cuda.text}")
    return tuple(machines), notes


def _list(deployment: Deployment) -> str:
    """Where deploy.toml, or the file that it names, lists the head."""
    nodes = deployment.data.nodes
    if nodes.file:
        return nodes.file
    table = "[nodes]" if nodes.hosts else "[[group]]" if deployment.data.group else "[[node]]"
    return f"{table} of {deployment.path.name}"


def _question(deployment: Deployment, facts: Facts, model: Model) -> tuple[Question, list[str]]:
    """The input of the planner, and notes about the nodes for the user."""
    data = deployment.data
    engine, machines, notes = _prepared(deployment, facts)
    known = {node.name: facts.node(node.name) for node in deployment.nodes}
    serving = [known[machine.name] for machine in machines]
    cache = str(data.engine_options.get("kv-cache-dtype", data.engine_options.get("kv_cache_dtype", "auto")))
    question = Question(
        engine=engine,
        model=model,
        machines=machines,
        forced=data.layout,
        prices=_prices(data.options.price_per_node_hour, machines),
        link=links.link(serving),
        cache_bytes=1 if cache.startswith("fp8") else BYTES,
        launcher=data.launcher,
    )
    return question, [*notes, *links.notes(serving)]


def _prepared(deployment: Deployment, facts: Facts) -> tuple[Engine, tuple[Machine, ...], list[str]]:
    """The engine, the nodes that can serve, and notes about both.

    Raises:
        ConfigError: the engine does not have an option or the launcher of deploy.toml.
        LayoutError: the nodes have different architectures, or the head has no GPU.
    """
    data = deployment.data
    engine, doubts = engines.planned_for(deployment)
    known = {node.name: facts.node(node.name) for node in deployment.nodes}
    engines.check(engine, data.engine_options, known[deployment.head.name].arch)
    if data.launcher == "native" and not engine.native:
        raise ConfigError(
            f'launcher = "native": {engine.name} cannot start on several nodes without Ray', remedy='set launcher = "ray"'
        )
    named: dict[str, list[str]] = {}
    for node in known.values():
        named.setdefault(node.arch, []).append(node.name)
    if len(named) > 1:
        each = "; ".join(f"{arch}: {', '.join(names)}" for arch, names in named.items())
        raise LayoutError(
            f"the nodes have different architectures ({each}), but all nodes of a deployment use the same wheels",
            remedy="use a separate deployment for the nodes of each architecture",
        )
    machines, notes = _machines(deployment, known)
    return engine, machines, [*doubts, *notes]


def _prices(own: float | None, machines: Sequence[Machine]) -> Mapping[str, float] | None:
    """$ per hour of each node: the price in deploy.toml, else the prices of its GPUs. None if a GPU has no price."""
    if own is not None:
        return dict.fromkeys((machine.name for machine in machines), own)
    known = {gpu.name: hardware.kind_of(gpu.name).price for machine in machines for gpu in machine.gpus}
    usd = {name: price.usd for name, price in known.items() if price}
    if len(usd) < len(known):
        return None
    return {machine.name: sum(usd[gpu.name] for gpu in machine.gpus) for machine in machines}


def trusted(deployment: Deployment, facts: Facts, repo: str, revision: str) -> ServePlan:
    """Make the plan for a model that the planner does not know, from [layout] and without predictions.

    Raises:
        ConfigError: tensor_parallel or pipeline_parallel is missing.
        LayoutError: there are not enough GPUs, or the engine cannot place the replicas on them.
    """
    data, forced = deployment.data, deployment.data.layout
    if not (forced.tensor_parallel and forced.pipeline_parallel):
        raise ConfigError(
            "[layout] trust requires tensor_parallel and pipeline_parallel, since the planner does not know the model",
            remedy="set both keys in [layout]; their product is the number of GPUs",
        )
    engine, machines, notes = _prepared(deployment, facts)
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
            f"{layout.name} requires {layout.world} GPUs, but there are {there}",
            remedy="set a smaller tensor_parallel, pipeline_parallel or data_parallel in [layout], or use more nodes",
        )
    each = len(machines[0].gpus) // (layout.tp * layout.pp)
    layout = layout.model_copy(update={"local_replicas": max(1, min(layout.dp, each)), "spans": layout.dp > 1 and each == 0})
    slots = placement.place(machines, layout.world)
    placement.check_replicas(engine, layout.tp * layout.pp, layout.dp, slots)
    if data.launcher == "native":
        placement.check_native(layout.name, layout.dp, slots)
    plan = _executed(deployment, facts, layout, [slot.machine.name for slot in slots], repo, revision)
    unused = [machine.name for machine in machines if machine.name not in {node.name for node in plan.nodes}]
    doubt = f"the planner does not know {repo}: it is served without a prediction of memory and speed ([layout] trust)"
    return identified(plan.model_copy(update={"spares": tuple(unused), "notes": (*notes, doubt)}))


def _executed(
    deployment: Deployment, facts: Facts, layout: Layout, places: Sequence[str], repo: str, revision: str
) -> ServePlan:
    """The executed part of the plan. `places` has the node's name for each GPU, in the engine's rank order."""
    (engine, _), head = engines.planned_for(deployment), facts.node(deployment.head.name)
    nodes = tuple(_node(deployment, engine, layout, facts.node(name), count, head) for name, count in Counter(places).items())
    serve = commands.serve(deployment, engine, layout, repo, revision)
    if deployment.data.launcher == "native":
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
            f"{model.repo} is not pinned yet: `deploy up` resolves {model.revision!r} to a commit, which changes the plan's id"
        )
    if model.vision and model.stored is None:
        notes.append(
            "the vision encoder is not counted: its size is not in config.json, and is known only when the files are fetched"
        )
    if model.experts and best.layout.dp > 1:
        notes.append(
            "the predicted speed of replicas that share experts is not calibrated: two measurements, of a small model on "
            "busy machines, reached 7 to 35 % of their predictions"
        )
    names = {slot.gpu.name for slot in best.slots if hardware.kind_of(slot.gpu.name) is hardware.UNKNOWN}
    notes += [f"the speed model does not know {name}: the predicted speed is a guess" for name in sorted(names)]
    kinds = sorted({slot.gpu.name for slot in best.slots})
    if len(kinds) > 1:
        notes.append(f"the GPUs differ ({', '.join(kinds)}): the smallest and the slowest GPU of each stage limit the stage")
    networks = sorted({facts.node(slot.machine.name).network for slot in best.slots})
    if len(networks) > 1:
        notes.append(
            f"the private addresses are in {len(networks)} networks ({', '.join(networks)}): set private or nic of the nodes, "
            "so that all these addresses are in one network"
        )
    return notes


def _unused(question: Question, best: Candidate, unused: Sequence[str]) -> list[str]:
    """A note about nodes that are not used."""
    if not unused:
        return []
    used = best.nodes
    which = unused[0] if len(unused) == 1 else f"{unused[0]} to {unused[-1]}"
    serving = "1 node serves" if used == 1 else f"{used} nodes serve"
    idle = "1 is not used" if len(unused) == 1 else f"{len(unused)} are not used"
    if question.objective == "throughput" and not question.engine.replicas:
        whose = question.engine.name
        return [f"{serving}, {idle} ({which}): deploy does not plan replicas of {whose}"]
    what = {"speed": "one stream", "throughput": "all streams together", "cost": "a token"}[question.objective]
    better = "cheaper" if question.objective == "cost" else "faster"
    return [f"{serving}, {idle} ({which}): with all nodes, {what} would not be noticeably {better}"]


def _separate(question: Question, choice: LayoutChoice) -> list[str]:
    """A note if several deployments of a layout are predicted to serve more than the chosen one. All nodes must be equal."""
    if question.objective != "throughput" or len({machine.gpus for machine in question.machines}) > 1:
        return []

    def together(candidate: Candidate) -> float:
        return len(question.machines) // candidate.nodes * choosing.most_tokens_per_s(candidate)

    most, chosen = max((choice.best, *choice.others), key=together), choosing.most_tokens_per_s(choice.best)
    if together(most) * choosing.ABOUT <= chosen:
        return []
    count, nodes = len(question.machines) // most.nodes, "1 node" if most.nodes == 1 else f"{most.nodes} nodes"
    sentence = (
        f"{count} separate deployments of {most.layout.name} on {nodes} each would serve more: they are predicted to reach "
        f"{together(most):,.0f} tokens/s together, and this deployment {chosen:,.0f} tokens/s"
    )
    return [sentence]


def cautions(facts: Facts) -> tuple[str, ...]:
    """Warnings about GPUs that were in use when the facts were collected. They are not part of the plan, which is stable."""
    sentences = []
    for node in facts.nodes:
        fullest = min(node.cuda.gpus, key=lambda gpu: gpu.free / gpu.total, default=None)
        if fullest and fullest.free < FREE * fullest.total:
            free = f"{fullest.free / GIB:.1f} of {fullest.total / GIB:.1f} GiB"
            sentences.append(
                f"{node.name}: {free} of GPU memory were free when the facts were collected; `deploy preflight` checks again"
            )
    return tuple(sentences)


def _alternatives(choice: LayoutChoice) -> tuple[Alternative, ...]:
    """The best layout for each other tp."""
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
    """The node names of the ranks of each stage."""
    order = [node.name for node in plan.nodes for _ in range(node.gpus)]
    return tuple(tuple(order[stage * plan.layout.tp : (stage + 1) * plan.layout.tp]) for stage in range(plan.layout.pp))
