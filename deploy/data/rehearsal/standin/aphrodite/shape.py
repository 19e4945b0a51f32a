"""A rank's part of a model, by the engine's rules: uneven tensor parallel, and the last stage gets the remainder."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Model:
    """A Llama's config.json."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    length: int
    architectures: tuple[str, ...]

    @property
    def head_size(self) -> int:
        """Dimensions of a head."""
        return self.hidden // self.heads


def read(folder: Path) -> Model:
    """Read config.json of a model's folder. Raises OSError with the message of transformers."""
    path = folder / "config.json"
    if not path.is_file():
        raise OSError(f"{folder} does not appear to have a file named config.json.")
    config: dict[str, Any] = json.loads(path.read_text())
    return Model(
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        heads=config["num_attention_heads"],
        kv_heads=config.get("num_key_value_heads", config["num_attention_heads"]),
        intermediate=config["intermediate_size"],
        vocabulary=config["vocab_size"],
        length=config.get("max_position_embeddings", 2048),
        architectures=tuple(config.get("architectures", ())),
    )


def divide(numerator: int, denominator: int) -> int:
    """Divide, or raise AssertionError if there is a remainder."""
    assert numerator % denominator == 0, f"{numerator} is not divisible by {denominator}"
    return numerator // denominator


def part(total: int, rank: int, size: int) -> int:
    """Size of a rank's part. The parts differ by at most one."""
    return total // size + (rank < total % size)


def layers(model: Model, stage: int, stages: int) -> int:
    """Number of layers of a stage. APHRODITE_PP_LAYER_PARTITION is read in the calling process, which is a worker."""
    text = os.environ.get("APHRODITE_PP_LAYER_PARTITION")
    if text is None:
        each = model.layers // stages
        return each if stage < stages - 1 else model.layers - each * (stages - 1)
    try:
        partitions = [int(layers) for layers in text.split(",")]
    except ValueError as error:
        raise ValueError(f"Invalid partition string: {text}") from error
    if len(partitions) != stages:
        raise ValueError(f"len(partitions)={len(partitions)} does not match pp_size={stages}.")
    if sum(partitions) != model.layers:
        raise ValueError(f"sum(partitions)={sum(partitions)} does not match num_hidden_layers={model.layers}.")
    return partitions[stage]


def kv_heads(model: Model, rank: int, size: int) -> int:
    """Number of KV heads of a rank. With more ranks than heads, tp must be divisible by the heads: not 9 to 15 for Llama."""
    if size > model.kv_heads:
        divide(size, model.kv_heads)
        return 1
    return part(model.kv_heads, rank, size)


@dataclass(frozen=True, kw_only=True)
class Held:
    """A rank's part of a model."""

    layers: int
    offloadable: int
    "Bytes of its layers in bf16."
    fixed: int
    "Bytes of embedding and head."
    token: int
    "Bytes of KV cache per token."


def held(model: Model, rank: int, tp: int, pp: int) -> Held:
    """The part of a global rank = stage * tp + rank within the stage. Raises AssertionError, ValueError like the engine."""
    stage, inner = divmod(rank, tp)
    count = layers(model, stage, pp)
    groups = kv_heads(model, inner, tp)
    queries = groups * (model.heads // model.kv_heads) if tp <= model.kv_heads else divide(model.heads, tp)
    size = model.head_size
    attention = 2 * model.hidden * queries * size + 2 * model.hidden * groups * size
    mlp = 3 * model.hidden * part(model.intermediate, inner, tp)
    ends = (stage == 0) + (stage == pp - 1)
    return Held(
        layers=count,
        offloadable=2 * count * (attention + mlp + 2 * model.hidden),
        fixed=2 * ends * -(-model.vocabulary // tp) * model.hidden,
        token=4 * count * groups * size,
    )
