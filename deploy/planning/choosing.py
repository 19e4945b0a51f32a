"""Which of the splits that fit serves the objective best, and why the others do not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from deploy.nodes.config import LayoutConfig
from deploy.planning import engines, hardware
from deploy.planning.layouts import Candidate, LayoutChoice, Question, Rejected, evaluate
from gracefarm.errors import LayoutError

ABOUT = 0.95
"Layouts that reach this share of the best one are as good as it: the prediction is not more exact."


def choose(question: Question) -> LayoutChoice:
    """The layout that fits and serves the objective best, within what deploy.toml forces.

    Raises:
        LayoutError: none fits; with the reason of the one that came nearest, or of the one that was forced.
    """
    forced = question.forced
    if forced.partition and forced.pipeline_parallel is None:
        forced = forced.model_copy(update={"pipeline_parallel": len(forced.partition)})
    if not question.machines or not question.machines[0].gpus:
        raise LayoutError(
            "the head has no usable GPU, and the engine's driver needs one", remedy="put a node with a GPU first"
        )
    reason = engines.gpu_refusal(question.engine, question.model, min(_capabilities(question)))
    if reason:
        raise LayoutError(reason, remedy="plan the repository with 16-bit weights, or other GPUs")
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
                failed.setdefault((tp, pp), error)
    if not fitting:
        nearest = max(failed, key=lambda split: (*_possible(question, *split), split[0] * split[1]))
        raise LayoutError(f"no layout fits: {failed[nearest].cause}", remedy=failed[nearest].remedy)
    best = _best(question, fitting)
    fitting.remove(best)
    fitting.sort(key=lambda candidate: (-_merit(question, candidate), candidate.nodes))
    fitting.insert(0, best)
    rejected = (*_worth_saying(failed, question), *_own_splits(question, fitting))
    return LayoutChoice(best=fitting[0], others=tuple(fitting[1:]), rejected=rejected)


def _merit(question: Question, candidate: Candidate) -> float:
    """What the objective counts: tokens/s of one stream, of all, or per dollar (per node and hour where no price is known)."""
    prediction = candidate.prediction
    most = max((level.tokens_per_s for level in prediction.levels), default=prediction.tokens_per_s)
    match question.objective:
        case "speed":
            return prediction.tokens_per_s
        case "throughput":
            return most
        case "cost":
            return most / candidate.nodes


def _best(question: Question, fitting: Sequence[Candidate]) -> Candidate:
    """Of those that are about as good as the best one, that on the fewest nodes and GPUs: what more would bring is noise."""
    most = max(_merit(question, candidate) for candidate in fitting)
    close = [candidate for candidate in fitting if _merit(question, candidate) >= most * ABOUT]
    return min(
        close,
        key=lambda candidate: (
            candidate.nodes,
            candidate.layout.world,
            -round(_merit(question, candidate), 1),
            -candidate.memory.cache_tokens,
        ),
    )


def _capabilities(question: Question) -> Iterator[int]:
    """Of the GPUs."""
    yield from (hardware.kind_of(gpu.name).sm for machine in question.machines for gpu in machine.gpus)


def _refused(question: Question, tp: int) -> str | None:
    """Why the engine does not split the model so."""
    whole = engines.expert_parallel(question.engine, question.model, tp, question.forced.expert_parallel)
    return engines.refusal(question.engine, question.model, tp, expert_parallel=whole)


def _replicas(question: Question, forced: LayoutConfig, world: int) -> Iterator[int]:
    """Numbers of replicas that are tried: for throughput as many as there is room for, else one."""
    if forced.data_parallel:
        yield forced.data_parallel
        return
    yield 1
    most = question.gpus // world
    if question.objective == "throughput" and question.engine.replicas and not question.model.experts and most > 1:
        yield most


def _pairs(question: Question, forced: LayoutConfig) -> Iterator[tuple[int, int]]:
    """What is tried. A tp that the engine refuses is tried once, for its reason, up to 16."""
    tps = [forced.tensor_parallel] if forced.tensor_parallel else range(1, question.gpus + 1)
    for tp in tps:
        refused = _refused(question, tp) is not None
        if forced.pipeline_parallel:
            yield tp, forced.pipeline_parallel
        elif refused and (tp <= 16 or forced.tensor_parallel):
            yield tp, 1
        elif not refused:
            yield from ((tp, pp) for pp in range(1, min(question.gpus // tp, question.model.layers) + 1))


def _possible(question: Question, tp: int, pp: int) -> tuple[bool, bool]:
    """The engine splits so, and there are the GPUs: what fails in spite of both is what a person wants to hear about."""
    return _refused(question, tp) is None, tp * pp <= question.gpus


def _worth_saying(failed: Mapping[tuple[int, int], LayoutError], question: Question) -> list[Rejected]:
    """Of each tp the attempt with the most stages: with fewer it fits still less."""
    last: dict[int, Rejected] = {}
    for (tp, pp), error in failed.items():
        if _refused(question, tp):
            last[tp] = Rejected(layout=f"tp{tp}", reason=error.cause.removeprefix(f"tp {tp}: "))
        else:
            last[tp] = Rejected(layout=f"tp{tp} pp{pp}", reason=error.cause.removeprefix(f"tp{tp} pp{pp}: "))
    return list(last.values())


def _own_splits(question: Question, fitting: Sequence[Candidate]) -> Iterator[Rejected]:
    """Layouts that fit by their partition alone: the engine's own split overloads the last stage."""
    if not question.engine.default_partition:
        return
    for candidate in fitting:
        own = engines.default_partition(question.model.layers, candidate.layout.pp)
        if own == candidate.layout.partition or (candidate.layout.offload_gib and candidate is not fitting[0]):
            continue  # nobody would take what is slow with our split already
        name = f"{candidate.layout.name}, the engine's own split {short(own)}"
        try:
            usual = evaluate(question, candidate.layout.tp, candidate.layout.pp, own)
        except LayoutError as error:
            yield Rejected(layout=name, reason=error.cause.removeprefix(f"{candidate.layout.name}: "))
            continue
        ours, theirs = candidate.layout.offload_gib, usual.layout.offload_gib
        if theirs > ours:
            yield Rejected(
                layout=name,
                reason=f"the last stage holds {usual.memory.weights_gib:.1f} GiB per GPU, {theirs:g} of them in host memory; "
                f"{short(candidate.layout.partition)} holds {candidate.memory.weights_gib:.1f} and {ours:g}",
            )


def short(partition: Sequence[int]) -> str:
    """12,12,12,18 as 12x3,18."""
    runs: list[list[int]] = []
    for layers in partition:
        if runs and runs[-1][0] == layers:
            runs[-1][1] += 1
        else:
            runs.append([layers, 1])
    return ",".join(f"{layers}x{count}" if count > 1 else str(layers) for layers, count in runs)
