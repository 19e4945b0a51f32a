"""How fast a served model is: one query as the tutorial's, and a sweep over requests at once beside the plan's prediction."""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import httpx
from pydantic import BaseModel, ConfigDict

from deploy.engine import completion
from deploy.engine.completion import Answer, Api, CompletionError, CompletionServer, Prompt
from deploy.planning.plans import ServePlan
from gracefarm.errors import EngineError

OnAnswer = Callable[[int, int], None]
"Answers so far, of how many."
TEXT = (
    "the river runs under old stone bridges while small boats wait for rain and people walk home slowly through narrow "
    "streets with bread fruit paper letters and a long story about winter"
)
"Common words are one token each in nearly every vocabulary; how many a prompt really had is told by the server."


class Spread(BaseModel):
    """Milliseconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    p50: float
    p90: float
    p99: float


class Level(BaseModel):
    """What so many requests at once gave. Tokens are the server's count, of requests that were answered whole."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    concurrency: int
    requests: int
    answered: int
    errors: Mapping[str, int]
    "Kind to number."
    first_error: str = ""
    seconds: float
    "From the first question to the last answer."
    prompt_tokens: int
    tokens: int
    tokens_per_s: float
    "Of all streams together."
    stream_tokens_per_s: float | None
    "Of one stream after its first token: the middle one."
    first_ms: Spread | None
    "Until the first text."
    token_ms: Spread | None
    "Between tokens: each request's time after its first text by the tokens that came in it."
    chunk_ms: Spread | None
    "Between chunks, which hold one token or several."
    usd_per_mtok: float | None
    predicted_tokens_per_s: float | None
    "The plan's one stream times so many: the most that the model of speed allows."


class SweepReport(BaseModel):
    """A sweep, as kept."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    taken: float
    server: str
    model: str
    api: Api
    prompt_tokens: int
    "Asked for; what the server counted stands in each level."
    max_tokens: int
    to_the_end: bool
    "The server was told not to end an answer before max_tokens."
    deployment: str | None = None
    plan: str | None = None
    layout: str | None = None
    usd_per_hour: float | None = None
    levels: tuple[Level, ...]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What to measure."""

    concurrency: Sequence[int]
    requests: int | None = None
    "Of each level; None: four times as many as at once, and at least 8."
    prompt_tokens: int = 128
    max_tokens: int = 128
    api: Api = "completions"
    patience: float = 120.0
    seed: int = 0

    def count(self, concurrency: int) -> int:
        """Requests of a level."""
        return self.requests or max(8, 4 * concurrency)


def percentile(values: Sequence[float], percent: int) -> float:
    """Linear between the two nearest, as numpy's. `values` is not empty."""
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def spread(seconds: Sequence[float]) -> Spread | None:
    """In milliseconds; None of nothing."""
    if not seconds:
        return None
    p50, p90, p99 = (round(1000 * percentile(seconds, percent), 2) for percent in (50, 90, 99))
    return Spread(p50=p50, p90=p90, p99=p99)


def prompt_text(tokens: int, seed: int) -> str:
    """About so many tokens; the first ones differ from every other prompt's, so that no prefix is found in a cache."""
    chance = random.Random(seed)  # noqa: S311 - for prompts
    start, words = f"{chance.getrandbits(32):08x}", TEXT.split()  # the start is about four tokens
    return " ".join([start, *(chance.choice(words) for _ in range(max(0, tokens - 4)))])


def prompts(sweep: Sweep, model: str, *, to_the_end: bool) -> Iterator[Prompt]:
    """One after the other, none twice."""
    for number in itertools.count(sweep.seed * 1_000_003):
        yield Prompt(
            model=model,
            text=prompt_text(sweep.prompt_tokens, number),
            max_tokens=sweep.max_tokens,
            api=sweep.api,
            to_the_end=to_the_end,
        )


async def find_model(client: httpx.AsyncClient, wanted: str | None) -> str:
    """The model to ask for. Raises EngineError: the server does not answer, refuses the key, or has another one."""
    try:
        names = await completion.models(client)
    except CompletionError as failure:
        if wanted:
            return wanted
        raise EngineError(f"{client.base_url}: {failure.cause}", remedy=remedy(failure.status)) from failure
    if wanted and wanted not in names:
        raise EngineError(f"there is no model {wanted!r}", remedy=f"there is: {', '.join(names)}")
    return wanted or names[0]


def remedy(status: int | None) -> str:
    """What to do about a server that does not answer as it should."""
    if status in (401, 403):
        return "its key: the deployment's own is found by itself; for --url set OPENAI_API_KEY or --key-file"
    return "`deploy status` tells what it is about; with --url: is the address right?"


async def query(server: CompletionServer, prompt: Prompt, *, patience: float, on_text: completion.OnText) -> Answer:
    """One answer, its text as it comes.

    Raises:
        EngineError: it was not whole.
    """
    async with server.client() as client:
        answer = await completion.stream(client, prompt, patience=patience, on_text=on_text)
    if answer.failure not in (None, "usage"):
        raise EngineError(f"{answer.failure}: {answer.cause}", remedy=remedy(answer.status))
    return answer


async def settle(client: httpx.AsyncClient, sweep: Sweep, model: str) -> bool:
    """Warm up with a short answer; whether the server takes `ignore_eos`.

    Raises:
        EngineError: it does not answer even that.
    """
    for to_the_end in (True, False):
        prompt = Prompt(model=model, text="Hello", max_tokens=4, api=sweep.api, to_the_end=to_the_end)
        answer = await completion.stream(client, prompt, patience=sweep.patience)
        if answer.failure in (None, "usage"):
            return to_the_end
        if answer.status not in (400, 422):
            break
    raise EngineError(f"{client.base_url}: {answer.failure}: {answer.cause}", remedy=remedy(answer.status))


async def measure(
    client: httpx.AsyncClient, source: Iterator[Prompt], sweep: Sweep, concurrency: int, on_answer: OnAnswer
) -> tuple[list[Answer], float]:
    """The answers of one level, and the seconds that they took together: `concurrency` of them are always under way."""
    count = sweep.count(concurrency)
    answers: list[Answer] = []
    left = iter(range(count))

    async def worker() -> None:
        for _ in left:
            answers.append(await completion.stream(client, next(source), patience=sweep.patience))
            on_answer(len(answers), count)

    begun = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, count)):
            group.create_task(worker())
    return answers, time.perf_counter() - begun


def level(answers: Sequence[Answer], seconds: float, concurrency: int, plan: ServePlan | None = None) -> Level:
    """Sum up."""
    good = [answer for answer in answers if answer.failure is None]
    errors = Counter(answer.failure for answer in answers if answer.failure)
    tokens = sum(answer.tokens or 0 for answer in good)
    rate = tokens / seconds if seconds else 0.0
    token_seconds = [answer.per_token for answer in good if answer.per_token]
    hour = plan.prediction.usd_per_hour if plan and plan.prediction else None
    predicted = plan.prediction.at(concurrency) if plan and plan.prediction else None
    return Level(
        concurrency=concurrency,
        requests=len(answers),
        answered=len(good),
        errors={str(kind): count for kind, count in errors.items()},
        first_error=next((answer.cause for answer in answers if answer.failure), ""),
        seconds=round(seconds, 3),
        prompt_tokens=sum(answer.prompt_tokens or 0 for answer in good),
        tokens=tokens,
        tokens_per_s=round(rate, 3),
        stream_tokens_per_s=round(1 / percentile(token_seconds, 50), 3) if token_seconds else None,
        first_ms=spread([answer.first for answer in good if answer.first is not None]),
        token_ms=spread(token_seconds),
        chunk_ms=spread([gap for answer in good for gap in answer.gaps]),
        usd_per_mtok=round(hour / (rate * 3600) * 1e6, 2) if hour is not None and rate else None,
        predicted_tokens_per_s=round(predicted, 2) if predicted else None,
    )


OnLevel = Callable[[Level], None]


async def run_sweep(
    server: CompletionServer,
    sweep: Sweep,
    *,
    model: str | None = None,
    plan: ServePlan | None = None,
    on_answer: Callable[[int, int, int], None] = lambda _concurrency, _done, _count: None,
    on_level: OnLevel = lambda _level: None,
) -> SweepReport:
    """Every level in turn.

    Raises:
        EngineError: the server does not answer at all. Errors of single requests are counted.
    """
    begun = time.time()
    levels = []
    async with server.client() as client:
        name = await find_model(client, model)
        to_the_end = await settle(client, sweep, name)
        source = prompts(sweep, name, to_the_end=to_the_end)
        for concurrency in sweep.concurrency:

            def tick(answered: int, count: int, concurrency: int = concurrency) -> None:
                on_answer(concurrency, answered, count)

            answers, seconds = await measure(client, source, sweep, concurrency, tick)
            levels.append(level(answers, seconds, concurrency, plan))
            on_level(levels[-1])
    return SweepReport(
        taken=begun,
        server=server.base,
        model=name,
        api=sweep.api,
        prompt_tokens=sweep.prompt_tokens,
        max_tokens=sweep.max_tokens,
        to_the_end=to_the_end,
        deployment=plan.deployment if plan else None,
        plan=plan.id if plan else None,
        layout=plan.layout.name if plan else None,
        usd_per_hour=plan.prediction.usd_per_hour if plan and plan.prediction else None,
        levels=tuple(levels),
    )
