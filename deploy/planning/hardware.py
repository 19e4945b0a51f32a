"""Kinds of nodes as data: memory, bandwidths, capability and price of what can be rented or bought (deploy/data/gpus.toml)."""

from __future__ import annotations

import datetime
import difflib
import tomllib
from functools import cache
from importlib import resources
from typing import Any

from pydantic import BaseModel, ConfigDict, NonNegativeFloat, PositiveFloat, PositiveInt

from gracefarm.errors import UsageError


class Price(BaseModel):
    """What a node costs for an hour, and who asked so much, when."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    usd: NonNegativeFloat
    date: datetime.date
    source: str


class NodeKind(BaseModel):
    """A kind of node; the head of gpus.toml says what each key means."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    match: str
    "Part of the GPU's name."
    mib: PositiveInt
    gpus: PositiveInt
    sm: PositiveInt
    "Compute capability without its point: 90 for 9.0."
    hbm_gb_s: PositiveFloat
    tflops: PositiveFloat
    "Dense, 16 bit."
    host_gb_s: PositiveFloat
    nvlink: bool
    unified: bool = False
    "Host and GPU share one memory: weights in host memory save nothing."
    host_gib: PositiveInt
    arch: str
    page: PositiveInt
    price: Price | None = None


UNKNOWN = NodeKind(
    name="unknown",
    match="",
    mib=1,
    gpus=1,
    sm=80,
    hbm_gb_s=2000,
    tflops=300,
    host_gb_s=25,
    nvlink=False,
    host_gib=1,
    arch="",
    page=4096,
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


def named(name: str) -> NodeKind:
    """A kind by its name, or by the beginning that it alone has; upper and lower case are one. Raises UsageError."""
    table, wanted = kinds(), name.lower()
    if wanted in table:
        return table[wanted]
    beginning = [known for known in table if known.startswith(wanted)]
    if len(beginning) == 1:
        return table[beginning[0]]
    near = beginning or difflib.get_close_matches(wanted, table, n=3, cutoff=0.5)
    raise UsageError(
        f"there is no kind of node {name!r}",
        remedy=f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(table)}",
    )
