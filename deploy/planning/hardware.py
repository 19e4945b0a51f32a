"""Kinds of nodes (deploy/data/gpus.toml): memory, bandwidths, compute capability and price."""

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
    """Price of a GPU per hour, with its date and source."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    usd: NonNegativeFloat
    date: datetime.date
    source: str


class NodeKind(BaseModel):
    """A kind of node. The first lines of gpus.toml describe the keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    match: str
    "A part of the GPU's name."
    mib: PositiveInt
    gpus: PositiveInt
    sm: PositiveInt
    "Compute capability without the point: 90 for 9.0."
    hbm_gb_s: PositiveFloat
    tflops: PositiveFloat
    "TFLOP/s, dense, 16 bit."
    host_gb_s: PositiveFloat
    nvlink: bool
    unified: bool = False
    "Host and GPU share one memory, so weights in host memory save nothing."
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
"Used for a GPU that is not in the table; the plan has a note about it."


@cache
def kinds() -> dict[str, NodeKind]:
    """All kinds by name."""
    table: dict[str, Any] = tomllib.loads((resources.files("deploy") / "data" / "gpus.toml").read_text())
    return {name: NodeKind(name=name, **values) for name, values in table.items()}


def kind_of(gpu: str) -> NodeKind:
    """The kind with the longest `match` in a GPU's name; UNKNOWN if there is none."""
    matching = [node_kind for node_kind in kinds().values() if node_kind.match in gpu]
    return max(matching, key=lambda node_kind: (len(node_kind.match), -node_kind.mib), default=UNKNOWN)


def named(name: str) -> NodeKind:
    """Find a kind by its name or a unique prefix, ignoring case. Raises UsageError."""
    table, wanted = kinds(), name.lower()
    if wanted in table:
        return table[wanted]
    beginning = [known for known in table if known.startswith(wanted)]
    if len(beginning) == 1:
        return table[beginning[0]]
    near = beginning or difflib.get_close_matches(wanted, table, n=3, cutoff=0.5)
    raise UsageError(
        f"unknown kind of node {name!r}",
        remedy=f"did you mean {' or '.join(near)}?" if near else f"known kinds: {', '.join(table)}",
    )
