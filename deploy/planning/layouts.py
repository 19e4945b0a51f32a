"""Which splits of a model fit these GPUs, what fits beside the weights, and which one is the fastest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from deploy.nodes.config import LayoutConfig
from deploy.nodes.facts import Gpu
from deploy.planning import engines, speed
from deploy.planning.engines import Engine
from deploy.planning.models import Model
from deploy.planning.shards import GIB, RankShare, balance, shares
from deploy.planning.speed import NodeKind, Prediction, StageLoad
from gracefarm.errors import LayoutError

RESERVE = 3 * GIB
"Per GPU for CUDA's context, NCCL's buffers, CUDA graphs, the activations of BATCHED tokens: an assumption, not measured here."
CACHE_FLOOR = 2 * GIB
"KV cache that a GPU gets at least; weights that do not leave it go to host memory."
HOST_SHARE = 0.6
"Of a node's memory that may be pinned for weights and swap: the rest is for the loader and its page cache."
SWAP = 4 * GIB
"The engine's default --swap-space, per GPU and pinned."
BLOCK = 16
"Tokens in a block of the cache."
BATCHED = 2048
"Tokens of one step; longer prompts come in chunks, so that activations stay within RESERVE however long a prompt is."
SAFE = 0.75
"Share of the predicted cache that the planner spends by itself: RESERVE is an assumption."
LEAST_TOKENS = 1024
"A layout that cannot hold so many is none."
USUAL_TOKENS = 512
"Tokens of a request for which the number of requests is chosen."
MOST_SEQS = 256


class Layout(BaseModel):
    """A way to split a model over nodes. Global rank = stage * tp + rank within the stage."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tp: PositiveInt
    "Tensor parallel: GPUs that share every layer."
    pp: PositiveInt
    "Pipeline parallel: stages, each with layers of its own."
    partition: tuple[PositiveInt, ...]
    "Layers of each stage."
    offload_gib: float = Field(default=0, ge=0)
    "Weights in host memory, per GPU."
    max_model_len: PositiveInt
    "Tokens of the longest request, prompt and answer together."
    max_num_seqs: PositiveInt
    "Requests that are worked on at the same time."
    max_num_batched_tokens: PositiveInt
    "Tokens of one step; prompts that are longer are cut into chunks."
    gmu: float = Field(gt=0, le=1)
    "Share of a GPU's memory that the engine takes."

    @property
    def world(self) -> int:
        """GPUs in all."""
        return self.tp * self.pp

    @property
    def name(self) -> str:
        """As people say it."""
        return f"tp{self.tp} pp{self.pp}"


class MemoryPlan(BaseModel):
    """What the fullest GPU holds, in GiB, and the tokens that fit in all."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights_gib: float
    "Of the fullest GPU, offloaded ones among them."
    by_stage_gib: tuple[tuple[float, ...], ...]
    "Weights of each rank of each stage."
    budget_gib: float
    "What the engine takes of the smallest GPU."
    reserve_gib: float
    cache_gib: float
    "KV cache of the GPU that limits it."
    token_bytes: int
    "KV cache of one token on that GPU."
    cache_tokens: int
    "On every GPU, in all."
    request_tokens: int
    "What one scheduler has: the most that a request can be. An engine with one cache per stage divides by pp."
    full_length: int
    "Requests of max_model_len that fit at the same time."
    host_gib: float
    "Pinned host memory of the fullest node."


class Rejected(BaseModel):
    """A layout that is none, and the sentence that says why."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layout: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A node, as the planner sees it."""

    name: str
    private: str
    gpus: tuple[Gpu, ...]
    host: int
    "Bytes of host memory."


@dataclass(frozen=True, kw_only=True)
class Slot:
    """A GPU with its global rank."""

    machine: Machine
    gpu: Gpu


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is to be planned. Machines come in the inventory's order, the head first."""

    engine: Engine
    model: Model
    machines: tuple[Machine, ...]
    forced: LayoutConfig = field(default_factory=LayoutConfig)
    price: float | None = None
    "$ per node and hour."

    @property
    def gpus(self) -> int:
        """In all."""
        return sum(len(machine.gpus) for machine in self.machines)

    @cached_property
    def price_per_node(self) -> float | None:
        """deploy.toml's, else the kind's."""
        return self.price if self.price is not None else speed.kind_of(self.machines[0].gpus[0].name).price


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layout that fits, with what it costs and brings."""

    layout: Layout
    slots: tuple[Slot, ...]
    "In the engine's rank order."
    memory: MemoryPlan
    prediction: Prediction

    @property
    def rank(self) -> tuple[float, int]:
        """The fastest first; of equal ones the one that holds more tokens."""
        return (-round(self.prediction.tokens_per_s, 1), -self.memory.cache_tokens)


@dataclass(frozen=True, kw_only=True)
class LayoutChoice:
    """The best layout, the others that fit, best first, and those that do not."""

    best: Candidate
    others: tuple[Candidate, ...]
    rejected: tuple[Rejected, ...]


# placing


def place(machines: Sequence[Machine], world: int) -> tuple[Slot, ...]:
    """The first `world` GPUs of the inventory, in the order in which the engine ranks its workers.

    The driver's node is first, then nodes with fewer workers, then by address as text (ray_gpu_executor.py).
    """
    taken: list[tuple[Machine, int]] = []
    for machine in machines:
        left = world - sum(count for _, count in taken)
        if left > 0:
            taken.append((machine, min(left, len(machine.gpus))))
    ordered = taken[:1] + sorted(taken[1:], key=lambda entry: (entry[1], entry[0].private))
    return tuple(Slot(machine=machine, gpu=gpu) for machine, count in ordered for gpu in machine.gpus[:count])


def budget(slot: Slot, gmu: float) -> int:
    """Bytes that the engine fills on a GPU: its share of all. What is free now is preflight's matter, not the plan's, which
    must not change when nodes are asked while they serve."""
    return int(slot.gpu.total * gmu)


def evaluate(question: Question, tp: int, pp: int, partition: Sequence[int] | None = None) -> Candidate:
    """The layout with these numbers, everything else chosen or as forced.

    Raises:
        LayoutError: the sentence that names the limit.
    """
    engine, model, forced = question.engine, question.model, question.forced
    engines.require(engine, model, tp)
    if tp * pp > question.gpus:
        raise LayoutError(
            f"tp{tp} pp{pp} needs {tp * pp} GPUs, and there are {question.gpus}", remedy="fewer stages or ranks, or more nodes"
        )
    stages = _partition(engine, model, tp, pp, partition)
    slots = place(question.machines, tp * pp)
    held = [share for stage in shares(engine, model, tp, stages) for share in stage]
    budgets = [budget(slot, forced.gpu_memory_utilization) for slot in slots]
    offload = _offload(question, f"tp{tp} pp{pp}", held, budgets)
    host = _host(f"tp{tp} pp{pp}", slots, offload)
    _swap(engine, tp, slots[0].machine)
    rooms = [room - share.weights + share.away(offload) - RESERVE for share, room in zip(held, budgets, strict=True)]
    limiting = min(range(len(held)), key=lambda index: rooms[index] // held[index].token)
    cache = rooms[limiting] // held[limiting].token // BLOCK * BLOCK
    request = cache if engine.shared_cache else cache // pp // BLOCK * BLOCK
    layout = _sized(question, tp, pp, stages, offload, request)
    weights = [share.weights / GIB for share in held]
    memory = MemoryPlan(
        weights_gib=round(max(weights), 3),
        by_stage_gib=tuple(tuple(round(size, 3) for size in weights[stage * tp : (stage + 1) * tp]) for stage in range(pp)),
        budget_gib=round(min(budgets) / GIB, 2),
        reserve_gib=RESERVE / GIB,
        cache_gib=round(rooms[limiting] / GIB, 2),
        token_bytes=held[limiting].token,
        cache_tokens=cache,
        request_tokens=request,
        full_length=request // layout.max_model_len * (1 if engine.shared_cache else pp),
        host_gib=round(host / GIB, 1),
    )
    return Candidate(layout=layout, slots=slots, memory=memory, prediction=_speed(question, layout, slots, held))


def _partition(engine: Engine, model: Model, tp: int, pp: int, given: Sequence[int] | None) -> tuple[int, ...]:
    if given is None:
        if pp > model.layers:
            raise LayoutError(f"pp {pp}: the model has {model.layers} layers", remedy="fewer stages")
        return balance(engine, model, tp, pp)
    if len(given) != pp:
        raise LayoutError(f"partition has {len(given)} stages, and pp is {pp}", remedy="one number of layers for each stage")
    if sum(given) != model.layers:
        raise LayoutError(
            f"partition sums to {sum(given)} layers, and the model has {model.layers}",
            remedy="every layer stands in one stage",
        )
    return tuple(given)


def _offload(question: Question, name: str, held: Sequence[RankShare], budgets: Sequence[int]) -> float:
    """GiB per GPU: 0 where the cache has its floor; else in tenths, so much that the fullest GPU has it."""
    forced = question.forced.cpu_offload_gib
    wants = [share.weights + RESERVE + CACHE_FLOOR - room for share, room in zip(held, budgets, strict=True)]
    worst = max(range(len(wants)), key=lambda index: wants[index])
    chosen = max(0, -(-wants[worst] * 10 // GIB)) / 10 if forced is None else forced
    lefts = [room - share.weights + share.away(chosen) - RESERVE for share, room in zip(held, budgets, strict=True)]
    least = min(range(len(held)), key=lambda index: lefts[index])
    left = lefts[least]
    if left < held[least].token * LEAST_TOKENS:
        raise LayoutError(
            f"{name}: a GPU holds {held[least].weights / GIB:.1f} GiB of weights"
            + (f", {chosen:g} GiB of them offloaded," if chosen else "")
            + f" and needs {RESERVE / GIB:.0f} GiB beside them, and the engine takes {budgets[least] / GIB:.1f} GiB",
            remedy="more nodes, weights in host memory (cpu_offload_gib), or a higher gpu_memory_utilization",
        )
    return chosen


def _host(name: str, slots: Sequence[Slot], offload: float) -> int:
    """Pinned bytes on the fullest node; offloading more than it has is refused."""
    most = 0
    for machine in dict.fromkeys(slot.machine for slot in slots):
        used = sum(slot.machine is machine for slot in slots) * (int(offload * GIB) + SWAP)
        if offload and used > HOST_SHARE * machine.host:
            raise LayoutError(
                f"{name}: {offload:g} GiB of weights per GPU in host memory pin {used / GIB:.0f} GiB of {machine.name}'s "
                f"{machine.host / GIB:.0f} GiB, and {HOST_SHARE:.0%} is the most",
                remedy="more nodes: from three GH200 on, Llama 405B fits in GPU and host memory",
            )
        most = max(most, used)
    return most


def _swap(engine: Engine, tp: int, head: Machine) -> None:
    """The engine's own check, on the head: it takes all ranks of a stage to be there."""
    if engine.swap_share and tp * SWAP > engine.swap_share * head.host:
        raise LayoutError(
            f"tp {tp}: {engine.name} wants {tp * SWAP / GIB:.0f} GiB of swap space in {head.name}'s {head.host / GIB:.0f} GiB "
            f"of host memory, and {engine.swap_share:.0%} is the most that it allows",
            remedy="a smaller tp, or more host memory",
        )


def _sized(question: Question, tp: int, pp: int, stages: tuple[int, ...], offload: float, request: int) -> Layout:
    """Lengths and numbers of requests that the cache holds."""
    forced, model = question.forced, question.model
    if forced.max_model_len and forced.max_model_len > model.max_len:
        raise LayoutError(
            f"max_model_len {forced.max_model_len}: the model was trained for {model.max_len} tokens", remedy="at most that"
        )
    length = forced.max_model_len or max(BLOCK, min(model.max_len, int(request * SAFE) // 256 * 256 or request))
    if length > request:
        raise LayoutError(
            f"tp{tp} pp{pp}: max_model_len {length}, and the KV cache holds {request} tokens of a request"
            + ("" if question.engine.shared_cache or pp == 1 else f" (it is cut into {pp} parts, one for each stage)"),
            remedy=f"at most {request}, or a layout with more cache: `deploy plan` lists them",
        )
    seqs = forced.max_num_seqs or max(1, min(MOST_SEQS, int(request * SAFE) // USUAL_TOKENS))
    if seqs > BATCHED:
        raise LayoutError(
            f"max_num_seqs {seqs}: a step has {BATCHED} tokens, one for each request at least", remedy=f"at most {BATCHED}"
        )
    return Layout(
        tp=tp,
        pp=pp,
        partition=stages,
        offload_gib=offload,
        max_model_len=length,
        max_num_seqs=seqs,
        max_num_batched_tokens=BATCHED,
        gmu=forced.gpu_memory_utilization,
    )


def _speed(question: Question, layout: Layout, slots: Sequence[Slot], held: Sequence[RankShare]) -> Prediction:
    nodes = len({slot.machine.name for slot in slots})
    price = question.price_per_node
    stages = []
    for stage, layers in enumerate(layout.partition):
        ranks = range(stage * layout.tp, (stage + 1) * layout.tp)
        away = [held[rank].away(layout.offload_gib) for rank in ranks]
        kind = min((speed.kind_of(slots[rank].gpu.name) for rank in ranks), key=lambda node_kind: node_kind.hbm_gb_s)
        stages.append(
            StageLoad(
                layers=layers,
                tp=layout.tp,
                resident=max(held[rank].weights - gone for rank, gone in zip(ranks, away, strict=True)),
                offloaded=max(away),
                kind=kind,
                within_node=kind.nvlink and len({slots[rank].machine.name for rank in ranks}) == 1,
            )
        )
    return speed.predict(stages, usd_per_hour=None if price is None else round(price * nodes, 2))


def second_figure(engine: Engine, model: Model) -> Prediction:
    """What the model says of the tutorial's second figure, 2 x 8 H100 with tp8 pp2, to be compared with speed.SECOND."""
    kind = speed.kinds()["h100-80x8"]
    return evaluate(Question(engine=engine, model=model, machines=machines_of(kind, 2)), 8, 2).prediction


def machines_of(kind: NodeKind, count: int) -> tuple[Machine, ...]:
    """Nodes that nobody has asked."""
    gpu = Gpu(name=kind.match, total=kind.mib << 20, free=kind.mib << 20)
    return tuple(
        Machine(name=f"k{index}", private=f"10.0.0.{index + 1}", gpus=(gpu,) * kind.gpus, host=kind.host_gib * GIB)
        for index in range(count)
    )


# choosing


def choose(question: Question) -> LayoutChoice:
    """The fastest layout that fits, within what deploy.toml forces.

    Raises:
        LayoutError: none fits; with the reason of the one that came nearest, or of the one that was forced.
    """
    forced = question.forced
    if forced.partition and forced.pipeline_parallel is None:
        forced = forced.model_copy(update={"pipeline_parallel": len(forced.partition)})
    if not question.machines or not question.machines[0].gpus:
        raise LayoutError(
            "the head has no usable GPU, and the engine's driver needs one", remedy="put a node with a GPU first"
        )
    if forced.tensor_parallel and forced.pipeline_parallel:
        only = evaluate(question, forced.tensor_parallel, forced.pipeline_parallel, forced.partition)
        return LayoutChoice(best=only, others=(), rejected=())
    fitting: list[Candidate] = []
    failed: dict[tuple[int, int], LayoutError] = {}
    for tp, pp in _pairs(question, forced):
        try:
            fitting.append(evaluate(question, tp, pp, forced.partition))
        except LayoutError as error:
            failed[tp, pp] = error
    if not fitting:
        nearest = max(failed, key=lambda split: (*_possible(question, *split), split[0] * split[1]))
        raise LayoutError(f"no layout fits: {failed[nearest].cause}", remedy=failed[nearest].remedy)
    fitting.sort(key=lambda candidate: candidate.rank)
    rejected = (*_worth_saying(failed, question), *_own_splits(question, fitting))
    return LayoutChoice(best=fitting[0], others=tuple(fitting[1:]), rejected=rejected)


def _pairs(question: Question, forced: LayoutConfig) -> Iterator[tuple[int, int]]:
    """What is tried. A tp that the engine refuses is tried once, for its reason, up to 16."""
    tps = [forced.tensor_parallel] if forced.tensor_parallel else range(1, question.gpus + 1)
    for tp in tps:
        refused = engines.refusal(question.engine, question.model, tp) is not None
        if forced.pipeline_parallel:
            yield tp, forced.pipeline_parallel
        elif refused and (tp <= 16 or forced.tensor_parallel):
            yield tp, 1
        elif not refused:
            yield from ((tp, pp) for pp in range(1, min(question.gpus // tp, question.model.layers) + 1))


def _possible(question: Question, tp: int, pp: int) -> tuple[bool, bool]:
    """The engine splits so, and there are the GPUs: what fails in spite of both is what a person wants to hear about."""
    return engines.refusal(question.engine, question.model, tp) is None, tp * pp <= question.gpus


def _worth_saying(failed: Mapping[tuple[int, int], LayoutError], question: Question) -> list[Rejected]:
    """Of each tp the attempt with the most stages: with fewer it fits still less."""
    last: dict[int, Rejected] = {}
    for (tp, pp), error in failed.items():
        if engines.refusal(question.engine, question.model, tp):
            last[tp] = Rejected(layout=f"tp{tp}", reason=error.cause.removeprefix(f"tp {tp}: "))
        else:
            last[tp] = Rejected(layout=f"tp{tp} pp{pp}", reason=error.cause.removeprefix(f"tp{tp} pp{pp}: "))
    return list(last.values())


def _own_splits(question: Question, fitting: Sequence[Candidate]) -> Iterator[Rejected]:
    """Layouts that fit by their partition alone: the engine's own split overloads the last stage."""
    if not question.engine.default_partition:
        return
    for candidate in fitting:
        own = engines.default_partition(question.model.layers, candidate.layout.pp)
        if own == candidate.layout.partition or (candidate.layout.offload_gib and candidate is not fitting[0]):
            continue  # nobody would take what is slow with our split already
        name = f"{candidate.layout.name}, the engine's own split {short(own)}"
        try:
            usual = evaluate(question, candidate.layout.tp, candidate.layout.pp, own)
        except LayoutError as error:
            yield Rejected(layout=name, reason=error.cause.removeprefix(f"{candidate.layout.name}: "))
            continue
        ours, theirs = candidate.layout.offload_gib, usual.layout.offload_gib
        if theirs > ours:
            yield Rejected(
                layout=name,
                reason=f"the last stage holds {usual.memory.weights_gib:.1f} GiB per GPU, {theirs:g} of them in host memory; "
                f"{short(candidate.layout.partition)} holds {candidate.memory.weights_gib:.1f} and {ours:g}",
            )


def short(partition: Sequence[int]) -> str:
    """12,12,12,18 as 12x3,18."""
    runs: list[list[int]] = []
    for layers in partition:
        if runs and runs[-1][0] == layers:
            runs[-1][1] += 1
        else:
            runs.append([layers, 1])
    return ",".join(f"{layers}x{count}" if count > 1 else str(layers) for layers, count in runs)
