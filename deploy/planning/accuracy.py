"""Compares predictions with measurements (deploy/data/accuracy.toml). Our own measurements have an error bound."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt

from deploy.nodes.config import LayoutConfig
from deploy.planning import engines, hardware, layouts, models, placement, speed
from deploy.planning.layouts import Question
from deploy.planning.shapes import Model
from deploy.planning.speed import Link, StageLoad
from gracefarm.errors import ConfigError


class MeasuredRun(BaseModel):
    """One row of the table: engine, model, machines, and the results by number of streams."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    model: str
    layers: PositiveInt | None = None
    "Number of layers, if fewer than the model has; None: all."
    engine: Literal["aphrodite", "vllm"] = "vllm"
    gpu: str
    nodes: PositiveInt = 1
    tp: PositiveInt
    pp: PositiveInt = 1
    dp: PositiveInt = 1
    tcp: bool = False
    "Collectives used TCP although the GPUs were on one node."
    gbit_s: PositiveFloat | None = None
    "InfiniBand or RoCE between the nodes."
    context: NonNegativeInt
    ms: Mapping[int, float] | None = None
    again: Mapping[int, float] = Field(default_factory=dict)
    "`ms` of a second run, on another machine."
    tokens_per_s: Mapping[int, float] | None = None
    committed: Mapping[int, float] | None = None
    "Tokens/s that were predicted before the run."
    bound: PositiveFloat | None = None
    beyond: Mapping[int, str] = Field(default_factory=dict)
    "Why the error exceeds the bound, by streams."
    fitted: bool = False
    source: str

    @property
    def measured(self) -> Mapping[int, float]:
        """Tokens/s of all streams together; empty if not measured yet."""
        return _rates(self.ms) if self.ms else self.tokens_per_s or {}


def _rates(ms: Mapping[int, float]) -> Mapping[int, float]:
    return {streams: round(streams / value * 1e3, 2) for streams, value in ms.items()}


class AccuracyRow(BaseModel):
    """A run with a number of streams. `error` and `error_again` are the relative errors of the prediction."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    streams: int
    predicted: float
    measured: float | None
    error: float | None
    again: float | None = None
    "Tokens/s of a second run."
    error_again: float | None = None
    bound: float | None
    why: str = ""
    "Why the error exceeds the bound."
    fitted: bool
    source: str

    @property
    def holds(self) -> bool:
        """True if the errors of both runs are within the bound, or there is no bound."""
        return self.bound is None or all(abs(error or 0) <= self.bound for error in (self.error, self.error_again))


@cache
def runs() -> tuple[MeasuredRun, ...]:
    """All rows of the table."""
    table = tomllib.loads((resources.files("deploy") / "data" / "accuracy.toml").read_text())
    return tuple(MeasuredRun.model_validate(entry) for entry in table["run"])


def rows(measured: Sequence[MeasuredRun] | None = None) -> tuple[AccuracyRow, ...]:
    """Predicted and measured values by run and number of streams; None: for the rows of the table."""
    chosen = runs() if measured is None else measured
    return tuple(_row(run, streams) for run in chosen for streams in (run.measured or run.committed or {}))


def _row(run: MeasuredRun, streams: int) -> AccuracyRow:
    predicted = (run.committed or {}).get(streams) or predict(run, streams)
    measured, again = run.measured.get(streams), _rates(run.again).get(streams)
    return AccuracyRow(
        name=run.name,
        streams=streams,
        predicted=round(predicted, 2),
        measured=measured,
        error=_error(predicted, measured),
        again=again,
        error_again=_error(predicted, again),
        bound=run.bound,
        why=run.beyond.get(streams, ""),
        fitted=run.fitted,
        source=run.source,
    )


def _error(predicted: float, measured: float | None) -> float | None:
    return None if measured is None else round(predicted / measured - 1, 3)


def predict(run: MeasuredRun, streams: int) -> float:
    """Tokens/s of all streams together, as the planner predicts now."""
    stages, traffic, link = loads(run)
    return speed.rate(stages, traffic, link, streams, run.context // 2, run.dp)


def loads(run: MeasuredRun) -> tuple[tuple[StageLoad, ...], speed.Traffic, Link]:
    """The load of each stage of a run per token. Raises ConfigError if its model is not built in."""
    built_in = models.built_in(run.model, "main")
    if built_in is None:
        raise ConfigError(f"{run.name}: {run.model} is not a built-in model", remedy="add it to deploy/data/models.toml")
    model: Model = built_in.model_copy(update={"layers": run.layers}) if run.layers else built_in
    link = speed.rdma(run.gbit_s) if run.gbit_s else Link()
    question = Question(
        engine=engines.engine(run.engine),
        model=model,
        machines=placement.machines_of(hardware.named(run.gpu), run.nodes),
        forced=LayoutConfig(max_num_seqs=1, max_model_len=max(run.context, 16)),
        link=link,
    )
    candidate = layouts.evaluate(question, run.tp, run.pp, dp=run.dp)
    split = layouts.split_of(question, run.tp, run.dp)
    held = layouts.ranks_of(question, split, candidate.layout.partition, run.dp)
    stages = layouts.stage_loads(question, candidate.layout, candidate.slots, held)
    if run.tcp:
        stages = tuple(
            dataclasses.replace(stage, within_node=False, same_node_as_next=False, exchange_within_node=False)
            for stage in stages
        )
    return stages, layouts.traffic(model), link
