"""The weights and cache of each rank of a split, by the engine's rules. docs/explanation/planner.md has the formulas."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType

from deploy.planning import engines
from deploy.planning.architectures import layer_tensors, outer_tensors
from deploy.planning.engines import Engine, Split
from deploy.planning.shapes import BYTES, Model
from deploy.planning.tensors import Tensor

GIB = 1 << 30
INDEX_GROUP = 128
"Number of 8-bit elements of an indexer's cache that share a scale of 4 bytes."

ROWS = MappingProxyType(
    {
        **dict.fromkeys(("q_proj", "q_b_proj", "kv_b_proj", "sinks"), "query"),
        **dict.fromkeys(("k_proj", "v_proj"), "key"),
        **dict.fromkeys(("gate_proj", "up_proj", "w1", "w3", "gate_up_proj"), "columns"),
    }
)
"Modules that are split by outputs, and the unit of the split."
COLUMNS = MappingProxyType({"o_proj": "query", **dict.fromkeys(("down_proj", "w2"), "columns")})
"Modules that are split by inputs, and the unit of the split."
_PER_INPUT = ("weight", "qweight", "weight_packed", "weight_scale", "weight_scale_inv", "qzeros", "scales", "g_idx")
"Tensors of a module split by inputs of which each rank has a part; every rank has the others whole."


@dataclass(frozen=True, kw_only=True)
class RankShare:
    """Weights and cache of one rank of one stage."""

    layers: int
    "Bytes of decoder layers, which can be offloaded."
    fixed: int
    "Bytes of embedding, output layer and last norm, which cannot be offloaded."
    dense: int
    "Bytes of the layers that every token reads: without the routed experts and without duplicates."
    head: int
    "Bytes of output layer and last norm. The embedding is not counted, since a token reads only one row."
    experts: int
    "Bytes of routed experts, of which a token reads only some."
    token: int
    "Bytes of KV cache per token in layers without a window."
    request: int
    "Bytes of KV cache per request in layers with a window; they do not depend on its length."

    @property
    def weights(self) -> int:
        """Bytes of all weights."""
        return self.layers + self.fixed

    def away(self, offload_gib: float) -> int:
        """Bytes in host memory; only layers are offloaded."""
        return min(int(offload_gib * GIB), self.layers)


@dataclass(frozen=True, kw_only=True)
class _LayerShare:
    """Bytes of one rank's part of one layer."""

    size: int
    experts: int
    twice: int
    token: int
    request: int


# one tensor


def _own(engine: Engine, model: Model, tp: int, rank: int, unit: str, units: int) -> int:
    """Number of a rank's units, which are query heads, KV heads or columns."""
    if unit == "columns":
        return engines.part(units, rank, tp)[1]
    if engine.replicates and tp > model.kv_heads:
        return 1 if unit == "key" else engines.part(units, rank, tp)[1]
    return engines.part(model.kv_heads, rank, tp)[1] * (units // model.kv_heads)


def _units(model: Model, unit: str, tensor: Tensor) -> int:
    """Number of units (heads or columns) of a tensor."""
    if unit == "query":
        return model.heads
    if unit == "key":
        return model.kv_heads
    if tensor.name.startswith(("mlp.experts", "feed_forward.experts", "block_sparse_moe.experts")) and model.experts:
        return model.experts.columns
    if "shared_expert" in tensor.name and model.experts:
        return model.experts.shared_columns
    return model.mlp


def held(engine: Engine, model: Model, tensor: Tensor, split: Split, rank: int, replica: int = 0) -> int:
    """Bytes of a rank's part of a tensor."""
    tensor = _as_loaded(tensor)
    if split.expert_parallel and _routed(tensor):
        count = _experts_in(model, tensor)
        return tensor.size // count * engines.part(count, replica * split.tp + rank, split.expert_ranks)[1]
    if split.by_tokens and "shared_expert" in tensor.name:
        return tensor.size
    module, _, kind = tensor.name.rpartition(".")
    name = module.rpartition(".")[2]
    if name == "experts":  # all experts are in one tensor, whose name is that of the module
        return _fused(model, tensor, kind, split)
    if kind == "sinks":
        name = kind
    if unit := ROWS.get(name):
        if kind in ("weight_shape", "g_idx") or (tensor.scale and math.prod(tensor.shape) == 1):
            return tensor.size
    elif unit := COLUMNS.get(name):
        per_row = kind == "weight_scale" and tensor.shape[1:] in ((), (1,))
        if kind not in _PER_INPUT or per_row or (tensor.scale and math.prod(tensor.shape) == 1):
            return tensor.size
    else:
        return tensor.size
    units = _units(model, unit, tensor)
    own = units // split.expert_ranks if _routed(tensor) else _own(engine, model, split.tp, rank, unit, units)
    return -(-tensor.size * own // units)


def _as_loaded(tensor: Tensor) -> Tensor:
    """The tensor in memory: scales of blocks have 32 bit, and the keys of an indexer 16 (vLLM 0.26.0, fp8_utils.py,
    deepseek_v2.py)."""
    if tensor.name == "self_attn.indexer.wk.weight":
        return replace(tensor, dtype="BF16")
    return replace(tensor, dtype="F32") if tensor.name.endswith("weight_scale_inv") else tensor


def _routed(tensor: Tensor) -> bool:
    return ".experts." in tensor.name


def _experts_in(model: Model, tensor: Tensor) -> int:
    assert model.experts is not None
    return tensor.count if "*" in tensor.name else model.experts.count


def _fused(model: Model, tensor: Tensor, kind: str, split: Split) -> int:
    """Bytes of a rank's part of a tensor with all experts. Their columns are split and, for some 4-bit kernels, padded."""
    assert model.experts is not None
    columns = model.experts.columns
    if not (model.quantization and model.quantization.method == "mxfp4"):
        whole = kind == "down_proj_bias"
        return tensor.size if whole else tensor.size // columns * (columns // split.expert_ranks)
    own = -(-(columns // split.expert_ranks) // split.expert_multiple) * split.expert_multiple
    hidden = -(-model.hidden // split.hidden_multiple) * split.hidden_multiple
    sizes = {
        "gate_up_proj_blocks": 2 * own * hidden // 2,
        "gate_up_proj_scales": 2 * own * hidden // 32,
        "gate_up_proj_bias": 2 * own * BYTES,
        "down_proj_blocks": hidden * own // 2,
        "down_proj_scales": hidden * own // 32,
        "down_proj_bias": hidden * BYTES,
    }
    return model.experts.count * sizes[kind]


# one layer


def _layer(engine: Engine, model: Model, split: Split, rank: int, replica: int, layer: int) -> _LayerShare:
    """A rank's part of a layer."""
    size = experts = 0
    for tensor in layer_tensors(model, layer):
        own = held(engine, model, tensor, split, rank, replica)
        size += own
        experts += own if _routed(tensor) else 0
    twice = _absorbed(model, split)
    cache = _cache(engine, model, split, rank, layer)
    full = model.sees_all(layer)
    window = 0 if full else (model.window or 0) + split.batched
    return _LayerShare(size=size + twice, experts=experts, twice=twice, token=cache if full else 0, request=cache * window)


def _absorbed(model: Model, split: Split) -> int:
    """Bytes of the copy of kv_b_proj in 16 bit, for decoding (W_UK_T and W_UV in vLLM 0.26.0, mla_attention.py)."""
    if model.latent is None:
        return 0
    latent = model.latent
    return model.heads // split.tp * (latent.nope + latent.value) * latent.kv_rank * BYTES


def _cache(engine: Engine, model: Model, split: Split, rank: int, layer: int) -> int:
    """Bytes of the cache of one token in one layer."""
    if model.latent:
        index = model.latent.index_dim + model.latent.index_dim // INDEX_GROUP * 4 if layer in model.latent.index_layers else 0
        return (model.latent.kv_rank + model.latent.rope) * split.cache_bytes + index
    return 2 * engines.kv_heads(engine, model, split.tp)[rank] * model.head_dim * split.cache_bytes


@lru_cache(maxsize=256)
def _layers(engine_name: str, model: Model, split: Split, replica: int = 0) -> tuple[tuple[_LayerShare, ...], ...]:
    """For each layer the part of every rank of a replica. Equal layers are computed once."""
    engine = engines.engine(engine_name)
    computed: dict[tuple[tuple[Tensor, ...], bool], tuple[_LayerShare, ...]] = {}
    layers = []
    for layer in range(model.layers):
        kind = (layer_tensors(model, layer), model.sees_all(layer))  # a layer with an indexer has different tensors
        if kind not in computed:
            computed[kind] = tuple(_layer(engine, model, split, rank, replica, layer) for rank in range(split.tp))
        layers.append(computed[kind])
    return tuple(layers)


# all layers


def shares(
    engine: Engine, model: Model, split: Split, partition: Sequence[int], replica: int = 0
) -> tuple[tuple[RankShare, ...], ...]:
    """The part of every rank of every stage of a replica. The first replica has the most, if experts are left over."""
    layers = _layers(engine.name, model, split, replica)
    last = len(partition) - 1
    stages, begin = [], 0
    for stage, count in enumerate(partition):
        own = layers[begin : begin + count]
        begin += count
        fixed, head = _outer(engine, model, split.tp, first=stage == 0, last=stage == last)
        stages.append(tuple(_share([layer[rank] for layer in own], fixed, head) for rank in range(split.tp)))
    return tuple(stages)


def _share(layers: Sequence[_LayerShare], fixed: int, head: int) -> RankShare:
    size, experts = sum(layer.size for layer in layers), sum(layer.experts for layer in layers)
    return RankShare(
        layers=size,
        fixed=fixed,
        dense=size - experts - sum(layer.twice for layer in layers),
        head=head,
        experts=experts,
        token=sum(layer.token for layer in layers),
        request=sum(layer.request for layer in layers),
    )


def _outer(engine: Engine, model: Model, tp: int, *, first: bool, last: bool) -> tuple[int, int]:
    """Bytes outside of the layers of a stage, and the bytes of them that a token reads (output layer and norm)."""
    rows = engines.vocab(engine, model, tp) // tp
    sizes = {tensor.name: tensor.size // tensor.shape[0] for tensor in outer_tensors(model)}
    table = rows * sizes["embed_tokens.weight"]
    head = rows * sizes.get("lm_head.weight", sizes["embed_tokens.weight"]) if last else 0
    norm = math.prod((model.hidden, BYTES)) if last else 0
    tied_here = first and last and model.tied
    other = model.stored.other if model.stored else 0
    return other + (table if first else 0) + (0 if tied_here else head) + norm, head + norm


def balance(engine: Engine, model: Model, split: Split, pp: int) -> tuple[int, ...]:
    """Layers of each stage, so that the fullest GPU has as little as possible."""
    sizes = [layer[0].size for layer in _layers(engine.name, model, split)]
    ends = [_outer(engine, model, split.tp, first=stage == 0, last=stage == pp - 1)[0] for stage in range(pp)]
    if len(set(sizes)) == 1:
        return _dealt(sizes[0], ends, model.layers)
    return _bounded(sizes, ends)


def _dealt(layer: int, ends: Sequence[int], layers: int) -> tuple[int, ...]:
    """Distribute equal layers: each to the stage with the least."""
    partition = [1] * len(ends)  # every stage needs at least one layer, even beside a large vocabulary
    heap = [(end + 2 * layer, index) for index, end in enumerate(ends)]
    heapq.heapify(heap)
    for _ in range(layers - len(ends)):
        load, index = heapq.heappop(heap)
        partition[index] += 1
        heapq.heappush(heap, (load + layer, index))
    return tuple(partition)


def _bounded(sizes: Sequence[int], ends: Sequence[int]) -> tuple[int, ...]:
    """Distribute different layers: find the smallest bound per stage with which all layers fit."""
    low, high = max(sizes), sum(sizes) + max(ends)
    while low < high:
        bound = (low + high) // 2
        if _filled(sizes, ends, bound) is None:
            low = bound + 1
        else:
            high = bound
    partition = _filled(sizes, ends, low)
    assert partition is not None
    return partition


def _filled(sizes: Sequence[int], ends: Sequence[int], bound: int) -> tuple[int, ...] | None:
    """Layers of each stage if no stage may exceed the bound; None: not all layers fit."""
    partition, place = [], 0
    for stage, end in enumerate(ends):
        most = len(sizes) - place - (len(ends) - stage - 1)  # every later stage needs one
        count, load = 0, end
        while count < most and load + sizes[place] <= bound:
            load += sizes[place]
            place += 1
            count += 1
        if count == 0:
            return None
        partition.append(count)
    return tuple(partition) if place == len(sizes) else None
