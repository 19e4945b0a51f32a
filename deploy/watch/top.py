"""Observes a deployment regularly: nodes and counters often, a completion (canary) less often."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass

from deploy.engine import metrics
from deploy.engine.metrics import EngineMetrics
from deploy.fleet.tunnels import Forward, WantedPort, opened
from deploy.remote.wire import Json
from deploy.steps.engine import Nodes
from deploy.watch import status
from deploy.watch.status import Service, Status, Watch
from gracefarm.errors import GracefarmError

CANARY = 30.0
"Maximum seconds of a completion of one token."
FIRST = 8.0
"Maximum seconds that the first moment waits for the canary."


@dataclass(frozen=True, kw_only=True)
class Moment:
    """The state at one time."""

    status: Status
    metrics: EngineMetrics | None
    "None: the engine does not listen."
    tokens_per_s: float | None = None
    "From its counter, since the previous moment; None: there was no previous moment."
    first_s: float | None = None
    "Mean seconds to the first token, of the requests that got it since the previous moment."
    usd_per_mtok: float | None = None

    def numbers(self) -> Json:
        """The numbers for JSON."""
        return {
            "metrics": self.metrics.model_dump() if self.metrics else None,
            "tokens_per_s": self.tokens_per_s,
            "first_s": self.first_s,
            "usd_per_mtok": self.usd_per_mtok,
        }


@dataclass
class _Canary:
    """Requests a token in the background, and stores the last result."""

    watch: Watch
    every: float
    service: Service
    alive: Nodes | None = None
    task: asyncio.Task[None] | None = None
    asked: float = float("-inf")

    def look(self, vitals: Mapping[str, Json]) -> None:
        """Start a new request if it is time and no request is running."""
        if (self.task is None or self.task.done()) and time.monotonic() - self.asked > self.every:
            self.asked = time.monotonic()
            self.task = asyncio.create_task(self._ask(vitals))

    async def _ask(self, vitals: Mapping[str, Json]) -> None:
        self.service, self.alive = await status.service_of(self.watch, vitals, CANARY)

    async def end(self) -> None:
        """Cancel a running request."""
        if self.task:
            self.task.cancel()
            with suppress(asyncio.CancelledError, GracefarmError):
                await self.task


@dataclass
class _Engine:
    """Reads the engine's counters through one forwarded port."""

    watch: Watch
    stack: AsyncExitStack
    forward: Forward | None = None

    async def scrape(self) -> EngineMetrics | None:
        """The counters; None if the engine does not listen or the head cannot be reached."""
        port = self.watch.deployment.data.ports.engine
        try:
            if self.forward is None:
                wanted = [WantedPort(name="engine", remote=port, local=0)]
                head = self.watch.deployment.head
                (self.forward,) = await self.stack.enter_async_context(opened(self.watch.fleet, head, wanted))
        except GracefarmError:
            return None
        return await metrics.scrape(self.forward.local, seconds=5)


async def watching(watch: Watch, *, every: float, canary_every: float, count: int | None = None) -> AsyncIterator[Moment]:
    """Yield a moment every `every` seconds, `count` times or without end. Only the first one waits briefly for the canary."""
    canary = _Canary(watch=watch, every=canary_every, service=Service(word="PLANNED", text="requesting a token"))
    async with AsyncExitStack() as stack:
        stack.push_async_callback(canary.end)
        engine = _Engine(watch=watch, stack=stack)
        before: EngineMetrics | None = None
        looked = time.monotonic()
        for number in itertools.count():
            begun = time.monotonic()
            vitals, bad = await status.vitals_of(watch)
            canary.look(vitals)
            if number == 0 and canary.task:
                await asyncio.wait({canary.task}, timeout=FIRST)
            now = await engine.scrape()
            passed, looked = time.monotonic() - looked, time.monotonic()
            seen = status.assemble(watch, vitals, bad, canary.service, canary.alive)
            yield _moment(seen, before, now, passed)
            before = now
            if number + 1 == count:
                return
            await asyncio.sleep(max(0.0, every - (time.monotonic() - begun)))


def _moment(seen: Status, before: EngineMetrics | None, now: EngineMetrics | None, seconds: float) -> Moment:
    rate = metrics.rate(before, now, seconds)
    hour = seen.usd_per_hour
    return Moment(
        status=seen,
        metrics=now,
        tokens_per_s=round(rate, 3) if rate is not None else None,
        first_s=metrics.first(before, now),
        usd_per_mtok=round(hour / (rate * 3600) * 1e6, 2) if hour is not None and rate else None,
    )
