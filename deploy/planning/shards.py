"""What each rank of a split holds, by the engine's rule and the model's shapes alone; docs/deploy.md has the formulas."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from deploy.planning import engines
from deploy.planning.engines import Engine
from deploy.planning.models import BYTES, Model

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class RankShare:
    """What one rank of one stage holds."""

    layers: int
    "Bytes of decoder layers: what can be offloaded."
    fixed: int
    "Bytes of embedding, output layer and last norm: what stays."
    token: int
    "Bytes of KV cache per token."

    @property
    def weights(self) -> int:
        """Bytes of all weights."""
        return self.layers + self.fixed

    def away(self, offload_gib: float) -> int:
        """Bytes in host memory: layers alone are offloaded."""
        return min(int(offload_gib * GIB), self.layers)


def slices(engine: Engine, model: Model, tp: int, rank: int) -> dict[str, tuple[int, int, int]]:
    """A rank's part of every tensor that is cut: name to axis (of the checkpoint's tensor), start and length.

    What is not named is held whole by every rank: norms, and the biases of o_proj and down_proj.
    """
    heads = model.heads // model.kv_heads
    if engine.replicates and tp > model.kv_heads:
        own = (rank * model.kv_heads // tp, 1)
        query = engines.part(model.heads, rank, tp)
    else:
        own = engines.part(model.kv_heads, rank, tp)
        query = (own[0] * heads, own[1] * heads)
    q = (query[0] * model.head_dim, query[1] * model.head_dim)
    kv = (own[0] * model.head_dim, own[1] * model.head_dim)
    columns = engines.part(model.mlp, rank, tp)
    cut = {
        "self_attn.q_proj.weight": (0, *q),
        "self_attn.k_proj.weight": (0, *kv),
        "self_attn.v_proj.weight": (0, *kv),
        "self_attn.o_proj.weight": (1, *q),
        "mlp.gate_proj.weight": (0, *columns),
        "mlp.up_proj.weight": (0, *columns),
        "mlp.down_proj.weight": (1, *columns),
    }
    if model.attention_bias:
        cut |= {f"self_attn.{name}_proj.bias": (0, *place) for name, place in (("q", q), ("k", kv), ("v", kv))}
    if model.mlp_bias:
        cut |= {f"mlp.{name}_proj.bias": (0, *columns) for name in ("gate", "up")}
    return cut


def layer_bytes(engine: Engine, model: Model, tp: int, rank: int) -> int:
    """Of one decoder layer on a rank."""
    cut = slices(engine, model, tp, rank)
    whole = model.layer_tensors()
    lengths = {
        **dict.fromkeys(("self_attn.q_proj", "self_attn.o_proj"), model.heads * model.head_dim),
        **dict.fromkeys(("self_attn.k_proj", "self_attn.v_proj"), model.kv_heads * model.head_dim),
        **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), model.mlp),
    }
    return BYTES * sum(
        size // lengths[name.rpartition(".")[0]] * cut[name][2] if name in cut else size for name, size in whole.items()
    )


def shares(engine: Engine, model: Model, tp: int, partition: Sequence[int]) -> tuple[tuple[RankShare, ...], ...]:
    """What every rank of every stage holds."""
    rows = engines.vocab(engine, model, tp) // tp
    table = rows * model.hidden * BYTES
    own = [layer_bytes(engine, model, tp, rank) for rank in range(tp)]
    heads = engines.kv_heads(engine, model, tp)
    last = len(partition) - 1
    stages = []
    for stage, layers in enumerate(partition):
        tables = (stage == 0) + (stage == last) - (stage == 0 == last and model.tied)
        fixed = tables * table + (model.hidden * BYTES if stage == last else 0)
        token = [2 * layers * kv * model.head_dim * BYTES for kv in heads]
        stages.append(tuple(RankShare(layers=layers * own[rank], fixed=fixed, token=token[rank]) for rank in range(tp)))
    return tuple(stages)


def balance(engine: Engine, model: Model, tp: int, pp: int) -> tuple[int, ...]:
    """Layers of each stage so that the fullest GPU holds as little as can be: layer by layer to the stage that has least."""
    layer = layer_bytes(engine, model, tp, 0)
    partition = [1] * pp  # a stage without layers is none, however large the vocabulary beside it
    heap = [(stage[0].weights + layer, index) for index, stage in enumerate(shares(engine, model, tp, partition))]
    heapq.heapify(heap)
    for _ in range(model.layers - pp):
        load, index = heapq.heappop(heap)
        partition[index] += 1
        heapq.heappush(heap, (load + layer, index))
    return tuple(partition)
