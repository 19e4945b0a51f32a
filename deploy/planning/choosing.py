"""Chooses the layout for the objective, and explains why other layouts were rejected."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence

from deploy.nodes.config import LayoutConfig
from deploy.planning import engines, hardware, placement
from deploy.planning.layouts import Candidate, LayoutChoice, Question, Rejected, evaluate, short_name, split_of
from gracefarm.errors import LayoutError

ABOUT = 0.95
"Layouts that reach this share of the best one count as equal, since the prediction is not more accurate."


def choose(question: Question) -> LayoutChoice:
    """Choose the best layout for the objective that fits and has the values of deploy.toml.

    Raises:
        LayoutError: no layout fits. The reason is that of the forced layout, or of the one that came closest.
    """
    forced = question.forced
    if forced.partition and forced.pipeline_parallel is None:
        forced = forced.model_copy(update={"pipeline_parallel": len(forced.partition)})
    if not question.machines or not question.machines[0].gpus:
        raise LayoutError(
            "the head (the first node) has no usable GPU, but the engine's main process runs there and requires one",
            remedy="put a node with a GPU in the first place: in [nodes] of deploy.toml, or in the file of addresses that "
            "[nodes] names",
        )
    _check_forced(question, forced)
    reason = engines.gpu_refusal(question.engine, question.model, min(_capabilities(question)))
    if reason:
        raise LayoutError(
            reason, remedy="set repo in [model] of deploy.toml to a repository with 16-bit weights, or use other GPUs"
        )
    if forced.tensor_parallel and forced.pipeline_parallel:
        dp = forced.data_parallel or 1
        only = evaluate(question, forced.tensor_parallel, forced.pipeline_parallel, forced.partition, dp)
        return LayoutChoice(best=only, others=(), rejected=())
    fitting: list[Candidate] = []
    failed: dict[tuple[int, int], LayoutError] = {}
    for tp, pp in _pairs(question, forced):
        for dp in _replicas(question, forced, tp * pp):
            try:
                fitting.append(evaluate(question, tp, pp, forced.partition, dp))
            except LayoutError as error:
                if dp == (forced.data_parallel or 1):  # other numbers of replicas are only tried
                    failed[tp, pp] = error
    if not fitting:
        nearest = max(failed, key=lambda split: (*_possible(question, *split), split[0] * split[1]))
        raise LayoutError(f"no layout fits: {failed[nearest].cause}", remedy=failed[nearest].remedy)
    best = _best(question, fitting)
    fitting.remove(best)
    fitting.sort(key=lambda candidate: (-_merit(question, candidate), candidate.nodes))
    fitting.insert(0, best)
    rejected = (*_worth_saying(failed, question), *_own_splits(question, fitting))
    return LayoutChoice(best=fitting[0], others=tuple(fitting[1:]), rejected=rejected)


def _check_forced(question: Question, forced: LayoutConfig) -> None:
    """Refuse whole experts of a model without experts, and more GPUs than there are. Raises LayoutError."""
    if forced.expert_parallel and not question.model.experts:
        raise LayoutError(
            f"expert_parallel is true in [layout], but {question.model.repo} has no experts",
            remedy="remove expert_parallel from [layout], or --ep from the command",
        )
    given = {"tp": forced.tensor_parallel, "pp": forced.pipeline_parallel, "dp": forced.data_parallel}
    least = math.prod(value or 1 for value in given.values())
    if least > question.gpus:
        raise LayoutError(
            f"{' '.join(f'{name}{value}' for name, value in given.items() if value)} requires "
            f"{'' if given['tp'] and given['pp'] else 'at least '}{least} GPUs, but there are {question.gpus}",
            remedy="set a smaller tensor_parallel, pipeline_parallel or data_parallel in [layout], or use more nodes",
        )


def most_tokens_per_s(candidate: Candidate) -> float:
    """Predicted tokens/s of all streams together, for the number of streams with the highest value."""
    prediction = candidate.prediction
    return max((level.tokens_per_s for level in prediction.levels), default=prediction.tokens_per_s)


def _merit(question: Question, candidate: Candidate) -> float:
    """The value to maximise: tokens/s of one stream, of all streams, or per dollar (without prices: per GPU of the nodes)."""
    prediction, most = candidate.prediction, most_tokens_per_s(candidate)
    match question.objective:
        case "speed":
            return prediction.tokens_per_s
        case "throughput":
            return most
        case "cost":
            gpus = sum(len(machine.gpus) for machine in candidate.machines.values())
            return most / (prediction.usd_per_hour or gpus)


def _best(question: Question, fitting: Sequence[Candidate]) -> Candidate:
    """Of the candidates that are nearly as good as the best one, the one with the fewest and cheapest nodes and fewest GPUs.

    This is repeated from there: no candidate with fewer or cheaper nodes is nearly as good as the one that is returned.
    """

    def price(candidate: Candidate) -> tuple[int, float]:
        return candidate.nodes, candidate.prediction.usd_per_hour or 0

    def close(to: Candidate) -> list[Candidate]:
        least = _merit(question, to) * ABOUT
        return [candidate for candidate in fitting if _merit(question, candidate) >= least]

    def cheapest(candidates: Sequence[Candidate]) -> Candidate:
        return min(
            candidates,
            key=lambda candidate: (
                *price(candidate),
                candidate.layout.world,
                -round(_merit(question, candidate), 1),
                -candidate.memory.cache_tokens,
            ),
        )

    best = cheapest(close(max(fitting, key=lambda candidate: _merit(question, candidate))))
    while cheaper := [candidate for candidate in close(best) if price(candidate) < price(best)]:
        best = cheapest(cheaper)
    return best


def _capabilities(question: Question) -> Iterator[int]:
    """The compute capabilities of the GPUs."""
    yield from (hardware.kind_of(gpu.name).sm for machine in question.machines for gpu in machine.gpus)


def _refused(question: Question, tp: int) -> str | None:
    """Why the engine refuses this tp, or None."""
    return engines.refusal(question.engine, question.model, split_of(question, tp, question.forced.data_parallel or 1))


def _starts(question: Question, world: int) -> bool:
    """Whether the launcher can start an engine without replicas on this number of GPUs."""
    return question.launcher == "ray" or placement.even(placement.place(question.machines, world))


def _replicas(question: Question, forced: LayoutConfig, world: int) -> Iterator[int]:
    """Numbers of replicas to try. Usually one.

    For throughput, as many as fit. Replicas of a model with experts share the experts. So any number may be the best one,
    for throughput and for the cost of a token. Of the numbers with fewer replicas on the last node, none is tried.
    """
    if forced.data_parallel:
        yield forced.data_parallel
        return
    yield 1
    # Without Ray, all replicas are on one node.
    most = (question.gpus if question.launcher == "ray" else len(question.machines[0].gpus)) // world
    if not question.engine.replicas or most <= 1:
        return
    if question.model.experts and question.objective != "speed":
        each = max(1, len(question.machines[0].gpus) // world)
        yield from (dp for dp in range(2, most + 1) if dp < each or dp % each == 0)
    elif question.objective == "throughput":
        yield most


def _pairs(question: Question, forced: LayoutConfig) -> Iterator[tuple[int, int]]:
    """Pairs of tp and pp to try. A tp up to 16 that the engine refuses is tried once, to get the reason."""
    each = question.gpus // (forced.data_parallel or 1)
    tps = [forced.tensor_parallel] if forced.tensor_parallel else range(1, each // (forced.pipeline_parallel or 1) + 1)
    for tp in tps:
        refused = _refused(question, tp) is not None
        if forced.pipeline_parallel:
            yield tp, forced.pipeline_parallel
        elif refused and (tp <= 16 or forced.tensor_parallel):
            yield tp, 1
        elif not refused:
            yield from ((tp, pp) for pp in range(1, min(each // tp, question.model.layers) + 1))


def _possible(question: Question, tp: int, pp: int) -> tuple[bool, bool]:
    """Whether engine and launcher accept this split. Errors of possible splits are most useful."""
    return _refused(question, tp) is None, _starts(question, tp * pp)


def _worth_saying(failed: Mapping[tuple[int, int], LayoutError], question: Question) -> list[Rejected]:
    """For each tp, the failed layout with the most stages that can be started. With fewer stages it would fit even less."""
    last: dict[int, Rejected] = {}
    dp = question.forced.data_parallel or 1
    for (tp, pp), error in failed.items():
        refused = _refused(question, tp)
        if not refused and not _starts(question, tp * pp):
            continue
        name = f"tp{tp}" + (f" dp{dp}" if dp > 1 else "") if refused else short_name(tp, pp, dp)
        last[tp] = Rejected(layout=name, reason=_without_sizes(error.cause, tp, pp, dp))
    return list(last.values())


def _without_sizes(cause: str, tp: int, pp: int, dp: int) -> str:
    """The cause of an error without the sizes of the layout in front, which the table names in its own column."""
    splits = (engines.sizes(tp, tp), engines.sizes(tp, tp * dp))
    for prefix in (
        short_name(tp, pp, dp),
        short_name(tp, pp, 1),
        *splits,
        *(f"{split} pp {pp}" for split in splits),
        f"pp {pp}",
        f"dp {dp}",
    ):
        if cause.startswith(f"{prefix}: "):
            # The table has one line for all layouts with the same reason.
            return re.sub(rf"(?<=divisible by ){tp}$", "tp", cause.removeprefix(f"{prefix}: "))
    return cause


def _own_splits(question: Question, fitting: Sequence[Candidate]) -> Iterator[Rejected]:
    """Layouts that fit only with our partition. The engine's default partition overloads the last stage."""
    if not question.engine.default_partition:
        return
    for candidate in fitting:
        own = engines.default_partition(question.model.layers, candidate.layout.pp)
        if own == candidate.layout.partition or (candidate.layout.offload_gib and candidate is not fitting[0]):
            continue  # not worth a note: the layout is slow with our partition too
        name = f"{candidate.layout.name} with the engine's default partition {short(own)}"
        try:
            usual = evaluate(question, candidate.layout.tp, candidate.layout.pp, own)
        except LayoutError as error:
            yield Rejected(layout=name, reason=error.cause.removeprefix(f"{candidate.layout.name}: "))
            continue
        ours, theirs = candidate.layout.offload_gib, usual.layout.offload_gib
        if theirs > ours:
            yield Rejected(
                layout=name,
                reason=f"the last stage has {usual.memory.weights_gib:.1f} GiB of weights per GPU ({theirs:g} GiB of them in "
                f"host memory); with the partition {short(candidate.layout.partition)}, no GPU has more than "
                f"{candidate.memory.weights_gib:.1f} GiB of weights ({ours:g} GiB of them in host memory)",
            )


def short(partition: Sequence[int]) -> str:
    """A partition in short form: 12,12,12,18 as 12x3,18."""
    runs: list[list[int]] = []
    for layers in partition:
        if runs and runs[-1][0] == layers:
            runs[-1][1] += 1
        else:
            runs.append([layers, 1])
    return ",".join(f"{layers}x{count}" if count > 1 else str(layers) for layers, count in runs)
