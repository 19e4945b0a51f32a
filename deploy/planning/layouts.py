"""Evaluates a split of a model on these GPUs: whether it fits, how many tokens fit, and its predicted speed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from deploy.nodes.config import Launcher, LayoutConfig, Objective
from deploy.planning import architectures, engines, hardware, speed
from deploy.planning.engines import Engine, Split
from deploy.planning.hardware import NodeKind
from deploy.planning.placement import Machine, Slot, check_native, check_replicas, place
from deploy.planning.shapes import BYTES, Model
from deploy.planning.shards import GIB, RankShare, balance, shares
from deploy.planning.speed import Link, Prediction, StageLoad, Traffic
from gracefarm.errors import LayoutError

RESERVE = 3 * GIB
"Bytes per GPU for CUDA's context, NCCL's buffers, CUDA graphs and activations of BATCHED tokens. An assumption, not measured."
CACHE_FLOOR = 2 * GIB
"Minimum KV cache of a GPU. Weights are offloaded until it fits."
HOST_SHARE = 0.6
"Share of a node's memory that may be pinned for weights and swap. The loader and the page cache need the rest."
SWAP = 4 * GIB
"The engine's default --swap-space per GPU, which is pinned."
BLOCK = 16
"Tokens per block of the cache."
BATCHED = 2048
"Tokens of one step. Longer prompts are split into chunks, so that activations fit in RESERVE for any length of prompt."
SAFE = 0.75
"Share of the predicted cache that the planner uses for its choices, since RESERVE is an assumption."
LEAST_TOKENS = 1024
"A layout whose cache has room for fewer tokens is rejected."
USUAL_TOKENS = 512
"Assumed tokens of a request, to choose the number of concurrent requests."
MOST_SEQS = 256


class Layout(BaseModel):
    """How the model is split over the GPUs."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    tp: PositiveInt
    "Tensor parallel: the number of GPUs that share every layer."
    pp: PositiveInt
    "Pipeline parallel: the number of stages. Each stage has a part of the layers."
    partition: tuple[PositiveInt, ...]
    "Number of layers of each stage. Empty: the planner does not know the model, and the engine chooses."
    offload_gib: float = Field(default=0, ge=0)
    "GiB of offloaded weights of each GPU."
    max_model_len: PositiveInt | None
    "Maximum number of tokens of a request. Prompt and answer count together. null: the engine chooses."
    max_num_seqs: PositiveInt | None
    "Maximum number of concurrent requests of a replica. null: the engine chooses."
    max_num_batched_tokens: PositiveInt
    "Maximum number of tokens that the engine processes in one step. Longer prompts are split."
    gmu: float = Field(gt=0, le=1)
    "Share of a GPU's memory that the engine uses, from 0 to 1."
    dp: PositiveInt = 1
    "Data parallel: the number of replicas."
    expert_parallel: bool = False
    "`true`: each GPU has whole experts. `false`: each GPU has a part of every expert."
    local_replicas: PositiveInt = 1
    "Number of replicas on each node. The last node may have fewer. If a replica uses several nodes, the value is 1."
    spans: bool = False
    "`true`: there are several replicas, and each of them uses several nodes."

    @property
    def world(self) -> int:
        """Number of GPUs."""
        return self.tp * self.pp * self.dp

    @property
    def name(self) -> str:
        """Short name, such as tp2 pp4."""
        words = [f"tp{self.tp}", f"pp{self.pp}"]
        words += [f"dp{self.dp}"] if self.dp > 1 else []
        words += ["ep"] if self.expert_parallel else []
        return " ".join(words)


class MemoryPlan(BaseModel):
    """Predicted use of memory."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    weights_gib: float
    "GiB of weights of the GPU that has the most weights. The value includes offloaded weights."
    by_stage_gib: tuple[tuple[float, ...], ...]
    "GiB of weights of each GPU of one replica. Each inner list has the values of one stage."
    budget_gib: float
    (
        "GiB that the engine may use on each GPU: the GPU's total memory multiplied by `gmu`. If the GPUs have different "
        "amounts of memory, this is the smallest of their values."
    )
    reserve_gib: float
    "GiB of `budget_gib` that are reserved on each GPU for activations and other buffers."
    cache_gib: float
    "GiB for the KV cache on the GPU whose KV cache holds the fewest tokens."
    token_bytes: int
    "Bytes of KV cache that one token needs on the GPU of `cache_gib`."
    cache_tokens: int
    "Number of tokens that fit into the KV caches of all replicas together."
    request_tokens: int
    "Number of tokens of the longest request that fits into the KV cache of one replica."
    full_length: int
    "Number of requests with `max_model_len` tokens that fit into the KV caches of all replicas at the same time."
    host_gib: float
    "GiB of pinned host memory on the node that pins the most. Pinned memory is never moved to disk."


class Rejected(BaseModel):
    """A layout that does not fit."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    layout: str
    "Name of the layout, for example `tp3`."
    reason: str
    "Reason why the layout does not fit."


@dataclass(frozen=True, kw_only=True)
class Question:
    """The input of the planner. The machines have the order of deploy.toml, the head first."""

    engine: Engine
    model: Model
    machines: tuple[Machine, ...]
    forced: LayoutConfig = field(default_factory=LayoutConfig)
    prices: Mapping[str, float] | None = None
    "$ per hour of each node, by its name."
    link: Link = field(default_factory=Link)
    "The network between the nodes."
    cache_bytes: int = BYTES
    "Bytes of an element of the KV cache."
    launcher: Launcher = "ray"
    "What connects the nodes."

    @property
    def objective(self) -> Objective:
        """What the layout is optimised for."""
        return self.forced.objective

    @property
    def gpus(self) -> int:
        """Number of GPUs."""
        return sum(len(machine.gpus) for machine in self.machines)

    @cached_property
    def kind(self) -> NodeKind:
        """The kind of the head's first GPU."""
        return hardware.kind_of(self.machines[0].gpus[0].name)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layout that fits, with its memory and prediction."""

    layout: Layout
    slots: tuple[Slot, ...]
    "The GPUs in the engine's rank order."
    memory: MemoryPlan
    prediction: Prediction

    @cached_property
    def machines(self) -> Mapping[str, Machine]:
        """The nodes that serve, by name."""
        return {slot.machine.name: slot.machine for slot in self.slots}

    @property
    def nodes(self) -> int:
        """Number of nodes that serve."""
        return len(self.machines)


@dataclass(frozen=True, kw_only=True)
class LayoutChoice:
    """The best layout, the other layouts that fit (best first), and the rejected layouts."""

    best: Candidate
    others: tuple[Candidate, ...]
    rejected: tuple[Rejected, ...]


def budget(slot: Slot, gmu: float) -> int:
    """Bytes that the engine uses on a GPU, as a share of its total memory.

    Free memory is checked by preflight, not here: the plan must not change if facts are collected while the nodes serve.
    """
    return int(slot.gpu.total * gmu)


def evaluate(question: Question, tp: int, pp: int, partition: Sequence[int] | None = None, dp: int = 1) -> Candidate:
    """Evaluate the layout with these numbers. All other values are those of deploy.toml, or are chosen.

    Raises:
        LayoutError: the layout does not fit; with the limit.
    """
    engine, forced = question.engine, question.forced
    split = split_of(question, tp, dp)
    engines.require(engine, question.model, split, pp, forced.expert_parallel, question.gpus // (pp * dp))
    if tp * pp * dp > question.gpus:
        raise LayoutError(
            f"{short_name(tp, pp, dp)} requires {tp * pp * dp} GPUs, but there are {question.gpus}",
            remedy="set a smaller tensor_parallel, pipeline_parallel or data_parallel in [layout], or use more nodes",
        )
    slots = place(question.machines, tp * pp * dp)
    check_replicas(engine, tp * pp, dp, slots)
    if question.launcher == "native":
        check_native(short_name(tp, pp, dp), dp, slots)
    stages = _partition(question, split, pp, partition)
    name = short_name(tp, pp, dp)
    held = ranks_of(question, split, stages, dp)
    budgets = [budget(slot, forced.gpu_memory_utilization) for slot in slots]
    reserve = RESERVE + gathered(question.model, split)
    offload = _offload(question, name, held, budgets, reserve)
    host = _host(name, slots, offload)
    _swap(engine, tp, slots[0].machine)
    rooms = [
        room - share.weights + share.away(offload) - reserve - share.request for share, room in zip(held, budgets, strict=True)
    ]
    limiting = min(range(len(held)), key=lambda index: rooms[index] // max(1, held[index].token))
    cache = rooms[limiting] // max(1, held[limiting].token) // BLOCK * BLOCK
    request = cache if engine.shared_cache else cache // pp // BLOCK * BLOCK
    each = len(slots[0].machine.gpus) // (tp * pp)
    placed = {"dp": dp, "local_replicas": max(1, min(dp, each)), "spans": each == 0} if dp > 1 else {}
    layout = _sized(question, split, pp, stages, offload, request).model_copy(update=placed)
    weights = [share.weights / GIB for share in held[: tp * pp]]
    memory = MemoryPlan(
        weights_gib=round(max(weights), 3),
        by_stage_gib=tuple(tuple(round(size, 3) for size in weights[stage * tp : (stage + 1) * tp]) for stage in range(pp)),
        budget_gib=round(min(budgets) / GIB, 2),
        reserve_gib=round(reserve / GIB, 2),
        cache_gib=round(rooms[limiting] / GIB, 2),
        token_bytes=held[limiting].token,
        cache_tokens=cache * dp,
        request_tokens=request,
        full_length=request // (layout.max_model_len or request) * (1 if engine.shared_cache else pp) * dp,
        host_gib=round(host / GIB, 1),
    )
    return Candidate(layout=layout, slots=slots, memory=memory, prediction=_speed(question, layout, slots, held))


def short_name(tp: int, pp: int, dp: int) -> str:
    """The name of a layout in messages."""
    return f"tp{tp} pp{pp}" + (f" dp{dp}" if dp > 1 else "")


def split_of(question: Question, tp: int, dp: int = 1) -> Split:
    """How the layers are divided among `tp` GPUs of these machines, and their experts among `dp` replicas."""
    columns, hidden = engines.mxfp4_padding(question.kind.sm)
    split = Split(
        tp=tp,
        dp=dp if question.model.experts else 1,
        batched=BATCHED,
        cache_bytes=question.cache_bytes,
        expert_multiple=columns,
        hidden_multiple=hidden,
    )
    return engines.with_experts(question.engine, question.model, split, question.forced.expert_parallel)


def ranks_of(question: Question, split: Split, stages: Sequence[int], dp: int) -> list[RankShare]:
    """The part of every rank: replica by replica, and in each of them stage by stage."""
    experts = question.model.experts
    same = experts is None or not split.expert_parallel or experts.count % split.expert_ranks == 0
    held: list[RankShare] = []
    for replica in range(1 if same else dp):
        parts = shares(question.engine, question.model, split, stages, replica)
        held += [share for stage in parts for share in stage]
    return held * dp if same else held


def gathered(model: Model, split: Split) -> int:
    """Bytes for the tokens of the other replicas, which a layer with experts gathers: the buffers of vLLM's Triton kernels.

    For each token its input, and two buffers for each of its experts (0.26.0, fused_moe/experts/triton_moe.py). RESERVE
    includes the buffers for the tokens of one replica.
    """
    if model.experts is None:
        return 0
    both = 2 * (model.experts.columns if split.expert_parallel else model.experts.columns // split.expert_ranks)
    elements = model.hidden + model.experts.per_token * (max(both // 2, model.hidden) + max(both, model.hidden))
    return (split.dp - 1) * split.batched * elements * BYTES


def _partition(question: Question, split: Split, pp: int, given: Sequence[int] | None) -> tuple[int, ...]:
    engine, model = question.engine, question.model
    if given is None:
        if pp > model.layers:
            raise LayoutError(
                f"pp {pp}: the model has only {model.layers} layers",
                remedy=f"set pipeline_parallel in [layout] to at most {model.layers}",
            )
        return balance(engine, model, split, pp)
    if len(given) != pp:
        raise LayoutError(
            f"partition has {len(given)} stages, but pipeline_parallel is {pp}",
            remedy=f"set partition in [layout] to {pp} numbers, the number of layers of each stage",
        )
    if sum(given) != model.layers:
        raise LayoutError(
            f"partition has {sum(given)} layers, but the model has {model.layers}",
            remedy=f"correct partition in [layout]: the sum of its numbers must be {model.layers}",
        )
    return tuple(given)


def _offload(question: Question, name: str, held: Sequence[RankShare], budgets: Sequence[int], reserve: int) -> float:
    """GiB of weights per GPU in host memory: 0 if every GPU has its minimum cache, else as many tenths as necessary."""
    forced = question.forced.cpu_offload_gib
    wants = [share.weights + share.request + reserve + CACHE_FLOOR - room for share, room in zip(held, budgets, strict=True)]
    worst = max(range(len(wants)), key=lambda index: wants[index])
    chosen = max(0, -(-wants[worst] * 10 // GIB)) / 10 if forced is None else forced
    if question.kind.unified:
        chosen = _unified(name, chosen, forced)
    lefts = [
        room - share.weights + share.away(chosen) - reserve - share.request for share, room in zip(held, budgets, strict=True)
    ]
    least = min(range(len(held)), key=lambda index: lefts[index])
    left = lefts[least]
    if left < held[least].token * LEAST_TOKENS:
        raise LayoutError(
            f"{name}: a GPU has {held[least].weights / GIB:.1f} GiB of weights"
            + (f" ({chosen:g} GiB of them offloaded)" if chosen else "")
            + f" and requires {reserve / GIB:.0f} GiB in addition, but the engine may use only {budgets[least] / GIB:.1f} GiB",
            remedy="use more nodes, or set cpu_offload_gib (weights in host memory) or gpu_memory_utilization in [layout]",
        )
    return chosen


def _unified(name: str, chosen: float, forced: float | None) -> float:
    """Offload nothing if host and GPU share one memory. Raises LayoutError if deploy.toml sets cpu_offload_gib."""
    if forced:
        raise LayoutError(
            f"{name}: GPU and host share one memory, so {chosen:g} GiB of weights in host memory save nothing",
            remedy="remove cpu_offload_gib from [layout]",
        )
    return 0.0


def _host(name: str, slots: Sequence[Slot], offload: float) -> int:
    """Pinned bytes on the fullest node. Raises LayoutError if a node does not have enough memory."""
    most = 0
    for machine in dict.fromkeys(slot.machine for slot in slots):
        used = sum(slot.machine is machine for slot in slots) * (int(offload * GIB) + SWAP)
        if offload and used > HOST_SHARE * machine.host:
            raise LayoutError(
                f"{name}: {used / GIB:.0f} GiB of the {machine.host / GIB:.0f} GiB of host memory on {machine.name} would be "
                f"pinned for weights; the maximum is {HOST_SHARE:.0%}",
                remedy="use more nodes, or nodes with more host memory",
            )
        most = max(most, used)
    return most


def _swap(engine: Engine, tp: int, head: Machine) -> None:
    """The check of the engine on the head, which assumes that all ranks of a stage are there."""
    if engine.swap_share and tp * SWAP > engine.swap_share * head.host:
        raise LayoutError(
            f"tp {tp}: {engine.name} would reserve {tp * SWAP / GIB:.0f} GiB of swap space on {head.name}, but the maximum is "
            f"{engine.swap_share:.0%} of the {head.host / GIB:.0f} GiB of host memory there",
            remedy="set a smaller tensor_parallel in [layout], or use a first node (the head) with more host memory",
        )


def _sized(question: Question, split: Split, pp: int, stages: tuple[int, ...], offload: float, request: int) -> Layout:
    """The layout with the length and number of requests for which the cache has room."""
    forced, model, tp = question.forced, question.model, split.tp
    if forced.max_model_len and forced.max_model_len > model.max_len:
        raise LayoutError(
            f"max_model_len {forced.max_model_len}: the model was trained for {model.max_len} tokens",
            remedy=f"set max_model_len in [layout] to at most {model.max_len}",
        )
    length = forced.max_model_len or max(BLOCK, min(model.max_len, int(request * SAFE) // 256 * 256 or request))
    if length > request:
        raise LayoutError(
            f"{short_name(tp, pp, split.dp)}: max_model_len is {length}, but the KV cache has room for a request of {request} "
            "tokens" + ("" if question.engine.shared_cache or pp == 1 else f" (it has {pp} parts, one for each stage)"),
            remedy=f"set max_model_len in [layout] to at most {request}, or use a layout with more cache (`deploy plan`)",
        )
    seqs = forced.max_num_seqs or max(1, min(MOST_SEQS, int(request * SAFE) // USUAL_TOKENS))
    if seqs > BATCHED:
        raise LayoutError(
            f"max_num_seqs {seqs}: a step has {BATCHED} tokens, and each request needs at least one",
            remedy=f"set max_num_seqs in [layout] to at most {BATCHED}",
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
        expert_parallel=split.expert_parallel,
    )


def _speed(question: Question, layout: Layout, slots: Sequence[Slot], held: Sequence[RankShare]) -> Prediction:
    nodes, prices = dict.fromkeys(slot.machine.name for slot in slots), question.prices
    return speed.predict(
        stage_loads(question, layout, slots, held),
        traffic(question.model),
        question.link,
        replicas=layout.dp,
        most=layout.max_num_seqs or MOST_SEQS,
        usd_per_hour=None if prices is None else round(sum(prices[name] for name in nodes), 2),
    )


def traffic(model: Model) -> Traffic:
    """The load of a token of this model that does not depend on the layout."""
    experts = model.experts
    return Traffic(
        hidden=model.hidden,
        experts=experts.count if experts else 1,
        per_token=experts.per_token if experts else 1,
    )


def stage_loads(question: Question, layout: Layout, slots: Sequence[Slot], held: Sequence[RankShare]) -> tuple[StageLoad, ...]:
    """The load of the stages of the first replica per token. No replica has more experts than the first one."""
    replicas = layout.dp if question.model.experts else 1
    split = Split(tp=layout.tp, dp=replicas, expert_parallel=layout.expert_parallel)
    exchange_ranks = engines.exchange_ranks(question.model, split)
    active = architectures.active_parameters(question.model)
    eight_bit = question.model.quantization is not None and question.model.quantization.method in ("fp8", "fbgemm_fp8")
    blocks = question.model.quantization is not None and question.model.quantization.block is not None
    each = speed.BLOCK_EXPERTS_S if blocks else speed.EXPERTS_S
    stages, begin = [], 0
    for stage, layers in enumerate(layout.partition):
        with_experts = sum(question.model.has_experts(layer) for layer in range(begin, begin + layers))
        begin += layers
        ranks = range(stage * layout.tp, (stage + 1) * layout.tp)
        kind = min((hardware.kind_of(slots[rank].gpu.name) for rank in ranks), key=lambda node_kind: node_kind.hbm_gb_s)
        share = max((held[rank] for rank in ranks), key=lambda own: own.dense + own.experts)
        away = share.away(layout.offload_gib) / share.layers
        copies = range(layout.dp)
        every = {(slots[copy * layout.tp * layout.pp + rank].machine.name, rank) for copy in copies for rank in ranks}
        groups_of = Counter(node for node, _ in every)
        here = [slots[rank].machine.name for rank in ranks]
        following = slots[ranks.stop].machine.name if stage + 1 < layout.pp else slots[0].machine.name
        stages.append(
            StageLoad(
                layers=layers,
                tp=layout.tp,
                resident=share.dense * (1 - away) + share.head,
                experts=share.experts * (1 - away),
                kernels_s=with_experts * each,
                offloaded=share.dense * away,
                offloaded_experts=share.experts * away,
                token=share.token,
                flops=2 * active * layers / question.model.layers / layout.tp / (2 if eight_bit and kind.sm >= 89 else 1),
                kind=kind,
                within_node=kind.nvlink and len(set(here)) == 1,
                replicas=replicas,
                exchanges=with_experts if replicas > 1 else 0,
                exchange_ranks=exchange_ranks,
                exchange_groups=max(groups_of.values()) if exchange_ranks == replicas and len(groups_of) > 1 else 1,
                exchange_within_node=kind.nvlink and len(groups_of) == 1,
                same_node_as_next=kind.nvlink and here[-1] == following,
            )
        )
    return tuple(stages)
