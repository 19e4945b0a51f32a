"""Measures a served model: a single query, and sweeps over numbers of concurrent requests with the plan's prediction."""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import httpx
from pydantic import BaseModel, ConfigDict

from deploy.engine import completion
from deploy.engine.completion import Answer, Api, CompletionError, CompletionServer, Prompt
from deploy.planning.plans import ServePlan
from gracefarm.errors import EngineError

Client = Literal["own", "vllm"]
"""The program that sends the requests. own: this module, on this machine; vllm: `vllm bench serve` on the head."""
OnAnswer = Callable[[int, int], None]
"Called with the number of answers, and of requests."
TEXT = (
    "the river runs under old stone bridges while small boats wait for rain and people walk home slowly through narrow "
    "streets with bread fruit paper letters and a long story about winter"
)
"Common words, which are one token in nearly every vocabulary. The server counts the actual tokens of a prompt."


class Spread(BaseModel):
    """Milliseconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    p50: float
    p90: float
    p99: float


class Level(BaseModel):
    """The result for a number of concurrent requests. Tokens are counted by the server, for complete answers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    concurrency: int
    requests: int
    answered: int
    errors: Mapping[str, int]
    "Number of errors by kind."
    first_error: str = ""
    seconds: float
    "Seconds from the first request to the last answer."
    prompt_tokens: int
    tokens: int
    tokens_per_s: float
    "Tokens/s of all streams together."
    stream_tokens_per_s: float | None
    "Median tokens/s of one stream after its first token."
    first_ms: Spread | None
    "Time to the first text."
    token_ms: Spread | None
    "Time between tokens: for each request, the time after its first text divided by the tokens."
    chunk_ms: Spread | None
    "Time between chunks, which have one token or more."
    usd_per_mtok: float | None
    predicted_tokens_per_s: float | None
    "Predicted tokens/s for this number of streams."


class SweepReport(BaseModel):
    """The stored result of a sweep."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    taken: float
    server: str
    model: str
    api: Api
    client: Client = "own"
    prompt_tokens: int
    "Requested tokens of a prompt. Each level has the number that the server counted."
    max_tokens: int
    to_the_end: bool
    "The server was told to generate exactly max_tokens."
    deployment: str | None = None
    plan: str | None = None
    layout: str | None = None
    usd_per_hour: float | None = None
    levels: tuple[Level, ...]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The parameters of a measurement."""

    concurrency: Sequence[int]
    requests: int | None = None
    "Number of requests per level; None: four times the concurrency, at least 8."
    prompt_tokens: int = 128
    max_tokens: int = 128
    api: Api = "completions"
    patience: float = 120.0
    seed: int = 0

    def count(self, concurrency: int) -> int:
        """Number of requests of a level."""
        return self.requests or max(8, 4 * concurrency)


def percentile(values: Sequence[float], percent: int) -> float:
    """A percentile, interpolated linearly like in numpy. `values` must not be empty."""
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def spread(seconds: Sequence[float]) -> Spread | None:
    """Percentiles in milliseconds; None if there are no values."""
    if not seconds:
        return None
    p50, p90, p99 = (round(1000 * percentile(seconds, percent), 2) for percent in (50, 90, 99))
    return Spread(p50=p50, p90=p90, p99=p99)


def prompt_text(tokens: int, seed: int) -> str:
    """A prompt of about this many tokens. Its start is unique, so that no prefix is found in a cache."""
    chance = random.Random(seed)  # noqa: S311 - for prompts
    start, words = f"{chance.getrandbits(32):08x}", TEXT.split()  # the start is about four tokens
    return " ".join([start, *(chance.choice(words) for _ in range(max(0, tokens - 4)))])


def prompts(sweep: Sweep, model: str, *, to_the_end: bool) -> Iterator[Prompt]:
    """An endless sequence of different prompts."""
    for number in itertools.count(sweep.seed * 1_000_003):
        yield Prompt(
            model=model,
            text=prompt_text(sweep.prompt_tokens, number),
            max_tokens=sweep.max_tokens,
            api=sweep.api,
            to_the_end=to_the_end,
        )


async def find_model(client: httpx.AsyncClient, wanted: str | None) -> str:
    """The name of the model. Raises EngineError if the server does not answer, refuses the key, or lacks the model."""
    try:
        names = await completion.models(client)
    except CompletionError as failure:
        if wanted:
            return wanted
        raise EngineError(
            f"{client.base_url} does not list its models: {failure.cause}", remedy=remedy(failure.status)
        ) from failure
    if wanted and wanted not in names:
        raise EngineError(f"the server has no model {wanted!r}", remedy=f"use one of its models: {', '.join(names)}")
    return wanted or names[0]


def remedy(status: int | None) -> str:
    """The remedy for a server that does not answer correctly."""
    if status in (401, 403):
        return "with --url, set the key with OPENAI_API_KEY or --key-file; otherwise run `deploy down`, then `deploy serve`"
    return "check the server with `deploy status`; with --url, check the address"


async def query(server: CompletionServer, prompt: Prompt, *, patience: float, on_text: completion.OnText) -> Answer:
    """Get one answer, and pass on its text as it arrives.

    Raises:
        EngineError: the answer is not complete.
    """
    async with server.client() as client:
        answer = await completion.stream(client, prompt, patience=patience, on_text=on_text)
    if answer.failure not in (None, "usage"):
        raise EngineError(f"the answer is not complete: {answer.failure}: {answer.cause}", remedy=remedy(answer.status))
    return answer


async def settle(client: httpx.AsyncClient, sweep: Sweep, model: str) -> bool:
    """Warm up with a short answer. Return whether the server accepts `ignore_eos`.

    Raises:
        EngineError: the server does not answer.
    """
    for to_the_end in (True, False):
        prompt = Prompt(model=model, text="Hello", max_tokens=4, api=sweep.api, to_the_end=to_the_end)
        answer = await completion.stream(client, prompt, patience=sweep.patience)
        if answer.failure in (None, "usage"):
            return to_the_end
        if answer.status not in (400, 422):
            break
    raise EngineError(
        f"{client.base_url} does not answer correctly: {answer.failure}: {answer.cause}", remedy=remedy(answer.status)
    )


async def measure(
    client: httpx.AsyncClient, source: Iterator[Prompt], sweep: Sweep, concurrency: int, on_answer: OnAnswer
) -> tuple[list[Answer], float]:
    """Run one level with `concurrency` requests at the same time. Return the answers, and the total seconds."""
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
    """Summarise the answers of a level."""
    good = [answer for answer in answers if answer.failure is None]
    errors = Counter(answer.failure for answer in answers if answer.failure)
    tokens = sum(answer.tokens or 0 for answer in good)
    rate = tokens / seconds if seconds else 0.0
    token_seconds = [answer.per_token for answer in good if answer.per_token]
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
        usd_per_mtok=usd_per_mtok(plan, rate),
        predicted_tokens_per_s=predicted_rate(plan, concurrency),
    )


def usd_per_mtok(plan: ServePlan | None, rate: float) -> float | None:
    """Dollars per million tokens at this rate; None if there is no price."""
    hour = plan.prediction.usd_per_hour if plan and plan.prediction else None
    return round(hour / (rate * 3600) * 1e6, 2) if hour is not None and rate else None


def predicted_rate(plan: ServePlan | None, concurrency: int) -> float | None:
    """The plan's prediction of tokens/s for this number of streams."""
    predicted = plan.prediction.at(concurrency) if plan and plan.prediction else None
    return round(predicted, 2) if predicted else None


OnLevel = Callable[[Level], None]
MeasureLevel = Callable[[str, int], Awaitable[Level]]
"Measures a level with another client. It is called with the model and the number of concurrent requests."


async def run_sweep(
    server: CompletionServer,
    sweep: Sweep,
    *,
    model: str | None = None,
    plan: ServePlan | None = None,
    vllm_level: MeasureLevel | None = None,
    on_answer: Callable[[int, int, int], None] = lambda _concurrency, _done, _count: None,
    on_level: OnLevel = lambda _level: None,
) -> SweepReport:
    """Run all levels in sequence. Errors of single requests are counted. `vllm_level` replaces the client of this module.

    Raises:
        EngineError: the server does not answer at all.
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

            if vllm_level:
                tick(0, sweep.count(concurrency))
                levels.append(await vllm_level(name, concurrency))
            else:
                answers, seconds = await measure(client, source, sweep, concurrency, tick)
                levels.append(level(answers, seconds, concurrency, plan))
            on_level(levels[-1])
    return SweepReport(
        taken=begun,
        server=server.base,
        model=name,
        api=sweep.api,
        client="vllm" if vllm_level else "own",
        prompt_tokens=sweep.prompt_tokens,
        max_tokens=sweep.max_tokens,
        to_the_end=to_the_end,
        deployment=plan.deployment if plan else None,
        plan=plan.id if plan else None,
        layout=plan.layout.name if plan else None,
        usd_per_hour=plan.prediction.usd_per_hour if plan and plan.prediction else None,
        levels=tuple(levels),
    )
