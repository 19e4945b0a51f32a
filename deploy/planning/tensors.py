"""Tensors of a checkpoint: name, shape, type and count, without their values."""

from __future__ import annotations

import math
from dataclasses import dataclass

from deploy.remote.checkpoint import BITS

_NUMBERS = ("weight", "bias", "weight_packed", "qweight", "gate_up_proj", "down_proj", "sinks")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensor:
    """One tensor of a layer, or `count` equal ones. The tensors of all experts are one entry, with `*` as the number."""

    name: str
    "Name within the layer, as in the checkpoint: `self_attn.q_proj.weight`, `mlp.experts.*.up_proj.weight`."
    shape: tuple[int, ...]
    dtype: str = "BF16"
    count: int = 1

    @property
    def elements(self) -> int:
        """Number of elements, of all `count` tensors."""
        return math.prod(self.shape) * self.count

    @property
    def size(self) -> int:
        """Bytes of all `count` tensors."""
        return self.elements * BITS[self.dtype] // 8

    @property
    def module(self) -> str:
        """The module of the tensor: `self_attn.q_proj`."""
        return self.name.rpartition(".")[0]

    @property
    def scale(self) -> bool:
        """True for scales and similar. A checkpoint may have more or fewer of them than config.json implies."""
        return self.name.rpartition(".")[2] not in _NUMBERS and not self.name.endswith("_blocks")
