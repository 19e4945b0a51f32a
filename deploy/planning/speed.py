"""Predicts the speed of decoding for several numbers of streams, and the time to the first token.

docs/explanation/planner.md has the formulas. A token passes all stages in order. In a stage, each GPU reads its weights once
for all streams (only the experts that a stream needs), reads the cache of every stream, and computes. Each layer has two
all-reduces. Stages process different streams at the same time.

Five constants are fitted to one table: vLLM 0.26.0 on four H200, 2026-11-28 (the rows with `fitted` in
deploy/data/accuracy.toml). Tests fit them again. The time of a layer and the times of experts come from aiconfigurator's
measurements. The other constants are assumptions and are marked as such.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from deploy.planning.hardware import NodeKind

LAYER_S = 35e-6
"""Seconds per layer for kernels, in addition to reading its bytes. An assumption, since the table cannot separate it from
all-reduces: Llama 3.1 8B on one GPU, from kernels that aiconfigurator 0.12 measured (`python -m bench planner`)."""
EFFICIENCY = 0.89
"Share of the data sheet's memory bandwidth that is reached for weights. From tp1 with one stream."
LOCAL_S = 20e-6
"Seconds of an all-reduce over NVLink, for two or four GPUs. From tp2 and tp4 with one stream."
STREAM_S = 24e-6
"Seconds for each additional stream: scheduling, sampling, attention. From tp1, tp2 and tp4 with 64 streams and one."
NETWORK_STEP_S = 34e-6
"Seconds of a ring step over TCP, in addition to the bytes; an all-reduce of n has 2 (n - 1). From tp2 over TCP and NVLink."
SOCKET_GB_S = 2.35
"GB/s over TCP, which a faster network does not exceed. From the same rows."
RDMA_STEP_S = 8e-6
"Seconds of a ring step over InfiniBand or RoCE. An assumption."
HOP_S = 3e-4
"Seconds of host work for a hop between stages, and for sending the token back to the first stage. An assumption."
EXPERTS_S = 15e-6
"""Seconds per layer with experts, in addition to its bytes: routing, sorting, small kernels. An assumption, since the table
has no experts: from kernels that aiconfigurator 0.12 measured for gpt-oss-120b on H200 (`python -m bench planner`)."""
BLOCK_EXPERTS_S = 105e-6
"The same for weights with one scale per block, whose inputs are quantised too. From Qwen3-235B-FP8 and DeepSeek-V3."
LINE = 0.9
"Share of a network's nominal speed that is reached. An assumption."
COMPUTE = 0.6
"Share of the data sheet's TFLOP/s that large batches reach. An assumption."
PROMPT = 512
"Tokens of the prompt and the answer so far, for which the speed is predicted."
STREAMS = (1, 4, 16, 64, 256)
"Numbers of concurrent streams for which the speed is predicted."


@dataclass(frozen=True, kw_only=True)
class Link:
    """The network between the serving nodes; the slowest one counts."""

    gb_s: float = SOCKET_GB_S
    step_s: float = NETWORK_STEP_S
    text: str = "TCP of unknown speed"


def tcp(mbit_s: int | None) -> Link:
    """The link over a network interface; None: its speed is unknown."""
    if not mbit_s:
        return Link()
    return Link(gb_s=min(SOCKET_GB_S, LINE * mbit_s / 8000), text=f"TCP at {mbit_s / 1000:g} Gb/s")


def rdma(gbit_s: float) -> Link:
    """The link over InfiniBand or RoCE."""
    return Link(gb_s=LINE * gbit_s / 8, step_s=RDMA_STEP_S, text=f"RDMA at {gbit_s:g} Gb/s")


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """The load of a token that depends on the model, not on a stage."""

    hidden: int
    experts: int = 1
    per_token: int = 1
    "Of the routed experts."

    def touched(self, streams: int) -> float:
        """Share of the experts that at least one of these streams needs, if each selects experts at random."""
        return 1 - (1 - self.per_token / self.experts) ** streams

    def message(self, streams: int) -> int:
        """Bytes of an all-reduce. A hop between stages has twice as many, since the residual is sent too."""
        return 2 * self.hidden * streams


@dataclass(frozen=True, kw_only=True)
class StageLoad:
    """The load of a stage for one token, on its slowest GPU."""

    layers: int
    tp: int
    resident: float
    "Bytes in GPU memory that are read in every step."
    experts: float = 0
    "Bytes of routed experts in GPU memory."
    kernels_s: float = 0
    "Seconds of its layers with experts, in addition to their bytes."
    offloaded: float = 0
    "Bytes in host memory that are read in every step."
    offloaded_experts: float = 0
    token: float = 0
    "Bytes of one token in the cache."
    flops: float = 0
    "Operations for one token on one GPU."
    kind: NodeKind
    within_node: bool
    "True if all its GPUs are on one node with NVLink."
    same_node_as_next: bool = False
    replicas: int = 1
    "Replicas that share the experts. A layer with experts processes the tokens of all of them."
    exchanges: int = 0
    "Layers with experts that gather the tokens of all replicas."
    exchange_ranks: int = 1
    "GPUs that gather these tokens, and return the results."
    exchange_groups: int = 1
    "Groups of such GPUs that exchange their tokens at the same time over the link of a node."
    exchange_within_node: bool = True
    "True if all these GPUs are on one node with NVLink."


class StreamLevel(BaseModel):
    """Predicted speed with several streams."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    streams: int
    "Number of concurrent streams."
    tokens_per_s: float
    "Tokens/s of all streams together."
    usd_per_mtok: float | None = None
    "Dollars per million tokens. null: the price of a GPU is unknown."


class Prediction(BaseModel):
    """Predicted speed of the layout."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    tokens_per_s: float
    "Tokens/s with one stream."
    weights_ms: float
    "Milliseconds per token to read weights from GPU memory."
    offload_ms: float
    "Milliseconds per token to read offloaded weights from host memory."
    collectives_ms: float
    "Milliseconds per token for all communication inside the stages, including `exchange_ms`."
    exchange_ms: float = 0
    "Milliseconds per token to exchange tokens between replicas that share experts."
    hops_ms: float = 0
    "Milliseconds per token to send data from stage to stage."
    first_token_ms: float = 0
    "Milliseconds until the first token of the answer to a prompt of 512 tokens, without other requests."
    levels: tuple[StreamLevel, ...] = ()
    "Predicted speed with several streams."
    usd_per_hour: float | None = None
    "Dollars per hour for all nodes. null: the price of a GPU is unknown."
    usd_per_mtok: float | None = None
    "Dollars per million tokens with one stream. null: the price of a GPU is unknown."

    def at(self, streams: int) -> float:
        """Tokens/s for any number of streams: interpolated, and beyond the last prediction equal to it."""
        below = [level for level in self.levels if level.streams <= streams]
        above = [level for level in self.levels if level.streams > streams]
        if not below:
            return self.tokens_per_s * streams
        low = below[-1]
        if not above:
            return low.tokens_per_s
        high = above[0]
        share = (streams - low.streams) / (high.streams - low.streams)
        return low.tokens_per_s + share * (high.tokens_per_s - low.tokens_per_s)


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds of one step of a stage, and of the hop to the next stage."""

    weights: float
    offload: float
    collectives: float
    exchange: float
    "The part of `collectives` between replicas."
    streams: float
    hop: float

    @property
    def stage(self) -> float:
        """Seconds without the hop."""
        return self.weights + self.offload + self.collectives + self.streams


def all_reduce(link: Link, ranks: int, size: int, *, within_node: bool) -> float:
    """Seconds of an all-reduce of `size` bytes."""
    if ranks == 1:
        return 0.0
    if within_node:
        return LOCAL_S
    return LOCAL_S + 2 * (ranks - 1) * link.step_s + 2 * (ranks - 1) / ranks * size / (link.gb_s * 1e9)


def step(stage: StageLoad, traffic: Traffic, link: Link, streams: int, context: int, *, stages: int) -> Times:
    """One step with `streams` streams of each replica, each with `context` tokens in the cache."""
    touched = traffic.touched(streams * stage.replicas)
    read = stage.resident + stage.experts * touched + stage.token * streams * context
    arriving = read / (stage.kind.hbm_gb_s * 1e9 * EFFICIENCY)
    computing = stage.flops * streams / (stage.kind.tflops * 1e12 * COMPUTE)
    away = (stage.offloaded + stage.offloaded_experts * touched) / (stage.kind.host_gb_s * 1e9)
    message = traffic.message(streams)
    each = all_reduce(link, stage.tp, message, within_node=stage.within_node)
    # Gathering the tokens and reducing the results moves as many bytes in as many steps as one all-reduce of all tokens.
    # Each group does this; those with a GPU on the same node share its link.
    all_tokens = traffic.message(streams * stage.replicas) * stage.exchange_groups
    exchange = all_reduce(link, stage.exchange_ranks, all_tokens, within_node=stage.exchange_within_node)
    hop = 0.0
    if stages > 1:
        sent = LOCAL_S if stage.same_node_as_next else 2 * link.step_s + 2 * message / (link.gb_s * 1e9)
        hop = HOP_S + sent
    return Times(
        weights=max(arriving, computing) + stage.layers * LAYER_S + stage.kernels_s,
        offload=away,
        collectives=2 * stage.layers * each + stage.exchanges * exchange,
        exchange=stage.exchanges * exchange,
        streams=STREAM_S * (streams - 1) / stages,
        hop=hop,
    )


def rate(stages: Sequence[StageLoad], traffic: Traffic, link: Link, streams: int, context: int, replicas: int = 1) -> float:
    """Tokens/s of all streams together."""
    own = math.ceil(streams / replicas)
    flying = min(len(stages), own)
    times = [step(stage, traffic, link, math.ceil(own / flying), context, stages=len(stages)) for stage in stages]
    through = sum(part.stage + part.hop for part in times)
    slowest = max(part.stage + part.hop for part in times)
    return streams / max(through, flying * slowest)


def first_token(stages: Sequence[StageLoad], traffic: Traffic, link: Link, tokens: int) -> float:
    """Seconds from a prompt to the first token, without other requests."""
    return sum(
        part.stage - part.streams + part.hop
        for part in (step(stage, traffic, link, tokens, 0, stages=len(stages)) for stage in stages)
    )


def predict(
    stages: Sequence[StageLoad],
    traffic: Traffic,
    link: Link,
    *,
    replicas: int = 1,
    most: int = STREAMS[-1],
    usd_per_hour: float | None = None,
) -> Prediction:
    """Speed and cost of up to `most` streams."""
    alone = [step(stage, traffic, link, 1, PROMPT, stages=len(stages)) for stage in stages]

    def price(tokens_per_s: float) -> float | None:
        return None if usd_per_hour is None else round(usd_per_hour / (tokens_per_s * 3600) * 1e6, 2)

    levels = []
    for streams in STREAMS:
        if streams <= most * replicas:
            tokens_per_s = rate(stages, traffic, link, streams, PROMPT, replicas)
            levels.append(StreamLevel(streams=streams, tokens_per_s=round(tokens_per_s, 2), usd_per_mtok=price(tokens_per_s)))
    single = rate(stages, traffic, link, 1, PROMPT)
    return Prediction(
        tokens_per_s=round(single, 2),
        weights_ms=round(sum(part.weights for part in alone) * 1e3, 1),
        offload_ms=round(sum(part.offload for part in alone) * 1e3, 1),
        collectives_ms=round(sum(part.collectives for part in alone) * 1e3, 1),
        exchange_ms=round(sum(part.exchange for part in alone) * 1e3, 1),
        hops_ms=round(sum(part.hop for part in alone) * 1e3, 2),
        first_token_ms=round(first_token(stages, traffic, link, PROMPT) * 1e3, 1),
        levels=tuple(levels),
        usd_per_hour=usd_per_hour,
        usd_per_mtok=price(single),
    )
