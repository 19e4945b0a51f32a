"""Predicted speed of one stream of tokens: a model with one fitted constant, whose error on the other known figure is told.

A token passes every stage in turn. In a stage each GPU reads its weights once, from its own memory or, where they are
offloaded, over the link to the host; and each layer has two all-reduces, of 2 (tp - 1) ring steps each. Nothing else is in it:
no kernel launches, no hops between stages, no attention over long contexts. It orders layouts; it is no promise.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from pydantic import BaseModel, ConfigDict

STEP_S = 74e-6
"A ring step between nodes. Fitted: the tutorial's tp5 pp2 on ten GH200 then has its measured 5.2 tokens/s."
LOCAL_STEP_S = 2e-6
"A ring step over NVLink: an assumption; NCCL's small all-reduces within a node of 8 take about 30 us."
MEASURED = 5.2
"Tokens/s of the tutorial: Llama 3.1 405B, ten GH200 96 GB, tp5 pp2."
SECOND = 16.0
"About what the tutorial reports for 2 x 8 H100. Not used for fitting."


class NodeKind(BaseModel):
    """A kind of node (deploy/data/gpus.toml)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    match: str
    mib: int
    gpus: int
    hbm_gb_s: float
    host_gb_s: float
    nvlink: bool
    host_gib: int
    arch: str
    page: int
    price: float | None = None


UNKNOWN = NodeKind(
    name="unknown", match="", mib=0, gpus=1, hbm_gb_s=2000, host_gb_s=25, nvlink=False, host_gib=0, arch="", page=4096
)
"Stands in for a GPU that the table does not have; the plan says so."


@cache
def kinds() -> dict[str, NodeKind]:
    """Every kind by name."""
    table: dict[str, Any] = tomllib.loads((resources.files("deploy") / "data" / "gpus.toml").read_text())
    return {name: NodeKind(name=name, **values) for name, values in table.items()}


def kind_of(gpu: str) -> NodeKind:
    """The kind whose `match` is the longest part of a GPU's name; UNKNOWN where none is."""
    matching = [node_kind for node_kind in kinds().values() if node_kind.match in gpu]
    return max(matching, key=lambda node_kind: (len(node_kind.match), -node_kind.mib), default=UNKNOWN)


@dataclass(frozen=True, kw_only=True)
class StageLoad:
    """What a stage does for one token: its slowest GPU counts."""

    layers: int
    tp: int
    resident: float
    "Bytes in GPU memory."
    offloaded: float
    "Bytes in host memory."
    kind: NodeKind
    within_node: bool
    "All its GPUs are on one node and joined by NVLink."


class Prediction(BaseModel):
    """For one stream. `usd_*`: None where no price is known."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens_per_s: float
    weights_ms: float
    offload_ms: float
    collectives_ms: float
    usd_per_hour: float | None = None
    usd_per_mtok: float | None = None


def predict(stages: Sequence[StageLoad], *, usd_per_hour: float | None = None, step_s: float = STEP_S) -> Prediction:
    """Tokens/s and cost of one stream through these stages."""
    weights = sum(stage.resident / (stage.kind.hbm_gb_s * 1e9) for stage in stages)
    offload = sum(stage.offloaded / (stage.kind.host_gb_s * 1e9) for stage in stages)
    steps = [(stage.layers * 2 * 2 * (stage.tp - 1), LOCAL_STEP_S if stage.within_node else step_s) for stage in stages]
    collectives = sum(count * seconds for count, seconds in steps)
    rate = 1 / (weights + offload + collectives)
    return Prediction(
        tokens_per_s=round(rate, 2),
        weights_ms=round(weights * 1e3, 1),
        offload_ms=round(offload * 1e3, 1),
        collectives_ms=round(collectives * 1e3, 1),
        usd_per_hour=usd_per_hour,
        usd_per_mtok=None if usd_per_hour is None else round(usd_per_hour / (rate * 3600) * 1e6, 2),
    )
