"""Tensors of a checkpoint: name, shape and type, and how many there are of the same; never their numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from deploy.remote.checkpoint import BITS

_NUMBERS = ("weight", "bias", "weight_packed", "qweight", "gate_up_proj", "down_proj", "sinks")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensor:
    """One tensor of a layer, or `count` alike of them: experts are one, with `*` for their number."""

    name: str
    "Within its layer, as in the checkpoint: `self_attn.q_proj.weight`, `mlp.experts.*.up_proj.weight`."
    shape: tuple[int, ...]
    dtype: str = "BF16"
    count: int = 1

    @property
    def elements(self) -> int:
        """Of all of them."""
        return math.prod(self.shape) * self.count

    @property
    def size(self) -> int:
        """Bytes of all of them."""
        return self.elements * BITS[self.dtype] // 8

    @property
    def module(self) -> str:
        """The module that holds it: `self_attn.q_proj`."""
        return self.name.rpartition(".")[0]

    @property
    def scale(self) -> bool:
        """It says how other numbers are to be read; of these, checkpoints have more or fewer than config.json implies."""
        return self.name.rpartition(".")[2] not in _NUMBERS and not self.name.endswith("_blocks")
