"""The plan: what runs, where, with which environment. What it prints is what `deploy serve` executes, argument by argument."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, PositiveInt

from deploy.nodes import paths, redact
from deploy.nodes.deployment import Deployment, Node
from deploy.nodes.facts import Facts, NodeFacts
from deploy.planning import engines, layouts, speed
from deploy.planning.engines import Engine
from deploy.planning.layouts import Candidate, Layout, LayoutChoice, Machine, MemoryPlan, Question, Rejected
from deploy.planning.models import Model
from deploy.planning.shards import GIB
from deploy.planning.speed import Prediction
from gracefarm.errors import ConfigError, LayoutError

REHEARSED = "gh200-96"
"What the nodes of a rehearsal are taken for: their GPUs are declared, not found."
OBJECT_STORE = 1 << 30
"Bytes; Ray would take 30 % of the host memory that weights may need, and the engine keeps nothing there."
OBJECT_STORE_REHEARSED = 128 << 20
FREE = 0.95
"Of a GPU's memory: with less, somebody uses it."
OFFLOAD_TIMEOUT = 600
"Seconds for one step: the engine's 60 s are too few where weights come from host memory."


RUNS = {"deployment", "engine", "model", "revision", "layout", "nodes", "serve", "serve_env", "secret_env"}
"Fields of a plan that are executed; the others say what to expect of it: a price, a better prediction, a spare."


class NodePlan(BaseModel):
    """One node's part. The command of its Ray, exactly; it ends when Ray runs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    address: str
    "As ssh reaches it."
    private: str
    "As the other nodes reach it: Ray's node address and the engine's host address."
    interface: str
    gpus: PositiveInt
    "GPUs that Ray is told of: the plan's tp * pp in all, never more."
    env: Mapping[str, str]
    "Of `ray start`: Ray's workers have no other environment."
    ray: tuple[str, ...]
    "Arguments of `ray start`."


class Alternative(BaseModel):
    """Another layout that fits these nodes: the best one with its tp."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layout: str
    partition: tuple[int, ...]
    offload_gib: float
    weights_gib: float
    request_tokens: int
    tokens_per_s: float
    usd_per_mtok: float | None


class ServePlan(BaseModel):
    """A deployment, planned. Whatever runs otherwise has another id; what is only told about it has not."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = ""
    "sha256 over what runs (RUNS) as canonical JSON. What runs carries it (plan_mark): another id would load the model anew."
    deployment: str
    engine: Literal["aphrodite", "vllm"]
    model: str
    "Repository on the Hub."
    revision: str
    "Commit; a branch where it was not resolved yet."
    layout: Layout
    nodes: tuple[NodePlan, ...]
    "In the engine's rank order, the head first."
    spares: tuple[str, ...] = ()
    "Names of nodes that Ray must not know of."
    serve: tuple[str, ...]
    "Arguments of the engine, on the head, listening on 127.0.0.1."
    serve_env: Mapping[str, str]
    "Its whole environment beside the login's."
    secret_env: tuple[str, ...]
    "Names of variables whose values are secret: `deploy serve` hands them over on stdin."
    memory: MemoryPlan
    prediction: Prediction
    alternatives: tuple[Alternative, ...] = ()
    rejected: tuple[Rejected, ...] = ()
    notes: tuple[str, ...] = ()
    "What a person should know: nodes that cannot serve, assumptions."

    @property
    def head(self) -> NodePlan:
        """Where Ray's head and the engine's driver run."""
        return self.nodes[0]


def identified(plan: ServePlan) -> ServePlan:
    """The plan with its id."""
    text = json.dumps(plan.model_dump(mode="json", include=RUNS), sort_keys=True, separators=(",", ":"))
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
    data = deployment.data
    engine = engines.engine(data.engine)
    known = {node.name: facts.node(node.name) for node in deployment.nodes}
    engines.check(engine, data.engine_options, known[deployment.head.name].arch)
    machines, notes = _machines(deployment, known)
    question = Question(
        engine=engine, model=model, machines=machines, forced=data.layout, price=data.options.price_per_node_hour
    )
    choice = layouts.choose(question)
    used = Counter(slot.machine.name for slot in choice.best.slots)
    layout = choice.best.layout
    nodes = tuple(
        _node(deployment, engine, layout, known[name], count, known[deployment.head.name]) for name, count in used.items()
    )
    serve = _serve(deployment, engine, layout, model)
    return identified(
        ServePlan(
            deployment=data.name,
            engine=data.engine,
            model=model.repo,
            revision=model.revision,
            layout=layout,
            nodes=nodes,
            spares=tuple(machine.name for machine in machines if machine.name not in used),
            serve=serve,
            serve_env=_serve_env(deployment, engine, nodes[0]),
            secret_env=(engine.key_variable,),
            memory=choice.best.memory,
            prediction=choice.best.prediction,
            alternatives=_alternatives(choice),
            rejected=choice.rejected,
            notes=(*notes, *_notes(choice.best, model, facts)),
        )
    )


def _machines(deployment: Deployment, known: Mapping[str, NodeFacts]) -> tuple[tuple[Machine, ...], list[str]]:
    """What each node has to offer, and of those that offer nothing why."""
    machines, notes = [], []
    for node in deployment.nodes:
        facts = known[node.name]
        if deployment.data.options.rehearsal:
            kind = speed.kinds()[REHEARSED]
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


def _notes(best: Candidate, model: Model, facts: Facts) -> list[str]:
    notes = []
    if not model.pinned:
        notes.append(
            f"{model.repo} at {model.revision!r} is not pinned yet: `deploy up` resolves it to a commit, which changes the id"
        )
    names = {slot.gpu.name for slot in best.slots if speed.kind_of(slot.gpu.name) is speed.UNKNOWN}
    notes += [f"the speed model does not know {name}: its figures are guesses" for name in sorted(names)]
    networks = sorted({facts.node(slot.machine.name).network for slot in best.slots})
    if len(networks) > 1:
        notes.append(f"the private addresses are in {len(networks)} networks ({', '.join(networks)}): set private or nic")
    return notes


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


# commands and environments


def _node(deployment: Deployment, engine: Engine, layout: Layout, facts: NodeFacts, gpus: int, head: NodeFacts) -> NodePlan:
    node = deployment.node(facts.name)
    return NodePlan(
        name=node.name,
        address=node.address,
        private=facts.private,
        interface=facts.interface,
        gpus=gpus,
        env=_env(deployment, engine, layout, facts, node),
        ray=ray_command(deployment, facts, node, gpus, head),
    )


def _env(deployment: Deployment, engine: Engine, layout: Layout, facts: NodeFacts, node: Node) -> dict[str, str]:
    """Of everything that runs on a node. Ray hands no more than CUDA_VISIBLE_DEVICES to its workers: all else must be here."""
    env = {
        engine.host_variable: facts.private,
        engine.port_variable: str(deployment.data.ports.engine_store),
        "NCCL_SOCKET_IFNAME": facts.interface,
        "GLOO_SOCKET_IFNAME": facts.interface,
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray before 2.52 knows no tokens and ignores both.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": paths.ray_token(deployment, node, facts.user),
    }
    own = layout.partition == engines.default_partition(sum(layout.partition), layout.pp)
    if layout.pp > 1 and not (engine.default_partition and own):
        env[engine.partition_variable] = ",".join(map(str, layout.partition))
    if layout.offload_gib:
        env[engine.timeout_variable] = str(OFFLOAD_TIMEOUT)
    for name, value in deployment.data.env.items():
        if redact.called_secret(name) or redact.Redactor().line(value) != value:
            raise ConfigError(
                f"[env] {name} is a secret, and deploy.toml and plans are read by many",
                remedy="remove it: keys are made by `deploy serve`, the Hub's token comes from HF_TOKEN of your own shell",
            )
        if name in (engine.host_variable, engine.partition_variable):
            raise ConfigError(f"[env] {name} is the plan's own", remedy="set private of the node, or [layout] partition")
        env[name] = value
    return env


def ray_command(deployment: Deployment, facts: NodeFacts, node: Node, gpus: int, head: NodeFacts) -> tuple[str, ...]:
    """Arguments of `ray start` on a node."""
    ports = deployment.data.ports
    store = OBJECT_STORE_REHEARSED if deployment.data.options.rehearsal else OBJECT_STORE
    mine: tuple[str, ...]
    if node.head:
        mine = ("--head", "--port", str(ports.ray), "--include-dashboard", "true")
        mine += ("--dashboard-host", "127.0.0.1", "--dashboard-port", str(ports.dashboard))
    else:
        mine = ("--address", _ray_address(head.private, deployment))
    return (
        paths.program(deployment, "ray"),
        "start",
        *mine,
        *("--node-ip-address", facts.private),
        *("--num-gpus", str(gpus)),
        *("--object-store-memory", str(store)),
        *("--object-manager-port", str(ports.object_manager)),
        *("--node-manager-port", str(ports.node_manager)),
        *("--dashboard-agent-listen-port", str(ports.agent)),
        *("--dashboard-agent-grpc-port", str(ports.agent_grpc)),
        *("--metrics-export-port", str(ports.metrics)),
        *("--runtime-env-agent-port", str(ports.runtime_env)),
        *("--min-worker-port", str(ports.workers_from)),
        *("--max-worker-port", str(ports.workers_to)),
        # Workers before Ray 2.5x warn that they take the head's.
        *("--temp-dir", paths.ray_temp(deployment, node, facts.user)),
        "--disable-usage-stats",
    )


def _ray_address(head: str, deployment: Deployment) -> str:
    return f"[{head}]:{deployment.data.ports.ray}" if ":" in head else f"{head}:{deployment.data.ports.ray}"


def _serve(deployment: Deployment, engine: Engine, layout: Layout, model: Model) -> tuple[str, ...]:
    program, *verb = engine.command
    given = engines.arguments(engine, deployment.data.engine_options)
    planned = [
        *("--host", "127.0.0.1"),
        *("--port", str(deployment.data.ports.engine)),
        *("--served-model-name", model.repo),
        *("--tensor-parallel-size", str(layout.tp)),
        *("--pipeline-parallel-size", str(layout.pp)),
        *("--distributed-executor-backend", "ray"),
        *("--gpu-memory-utilization", f"{layout.gmu:g}"),
        *("--max-model-len", str(layout.max_model_len)),
        *("--max-num-seqs", str(layout.max_num_seqs)),
    ]
    if layout.max_model_len > layout.max_num_batched_tokens:
        # Else the engine would profile a step as long as the longest request, and its activations would take the cache's room.
        planned += ["--max-num-batched-tokens", str(layout.max_num_batched_tokens)]
        planned += ["--enable-chunked-prefill", *(("true",) if engine.name == "aphrodite" else ())]
    if layout.offload_gib:
        planned += ["--cpu-offload-gb", f"{layout.offload_gib:g}"]
    engines.validate(engine, [*planned, *given])
    folder = paths.weights(paths.root(deployment), model.repo, model.revision)
    return (paths.program(deployment, program), *verb, folder, *planned, *given)


def _serve_env(deployment: Deployment, engine: Engine, head: NodePlan) -> dict[str, str]:
    return {
        **head.env,
        **engine.env,
        "RAY_ADDRESS": _ray_address(head.private, deployment),
        # The weights are there; nothing is to be asked of the network while it starts.
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }


def ranks(plan: ServePlan) -> tuple[tuple[str, ...], ...]:
    """Node names of each stage's ranks."""
    order = [node.name for node in plan.nodes for _ in range(node.gpus)]
    return tuple(tuple(order[stage * plan.layout.tp : (stage + 1) * plan.layout.tp]) for stage in range(plan.layout.pp))
