"""The loop that generates tokens: one step of all ranks gives each running request one token."""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from aphrodite.executor import Executor
from aphrodite.log import error, say
from aphrodite.metrics import Metrics
from aphrodite.trouble import ordered

TEXT = "The rehearsal answers with these words , one token each , until it has said as many as it was asked for ."


class EngineDeadError(RuntimeError):
    """The loop has ended, and requests are no longer answered."""


@dataclass
class Request:
    """One running completion."""

    id: str
    prompt_tokens: int
    max_tokens: int
    stop_at: int
    "Tokens after which the model itself ends."
    arrived: float = field(default_factory=time.monotonic)
    made: int = 0
    tokens: asyncio.Queue[str | Exception | None] = field(default_factory=asyncio.Queue)
    gone: bool = False


class Engine:
    """Runs at most `max_num_seqs` requests at the same time; the others wait."""

    def __init__(self, executor: Executor, options: dict[str, Any], metrics: Metrics) -> None:
        self.executor = executor
        self.options = options
        self.metrics = metrics
        self.timeout = float(os.environ.get("APHRODITE_ENGINE_ITERATION_TIMEOUT_S", "60"))
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.dead: Exception | None = None
        self.work = asyncio.Event()

    async def generate(self, request: Request) -> AsyncIterator[str]:
        """Yield tokens. Raises EngineDeadError."""
        if self.dead is not None:
            raise EngineDeadError("Background loop has errored already.")
        if not self.options["disable_log_requests"]:
            say(f"Added request {request.id}.")
        self.waiting.append(request)
        self.work.set()
        try:
            while True:
                token = await request.tokens.get()
                if token is None:
                    return
                if isinstance(token, Exception):
                    raise EngineDeadError(str(token)) from token
                yield token
        finally:
            request.gone = True

    async def loop(self) -> None:
        """Run until an error occurs."""
        try:
            while True:
                await self.work.wait()
                await self._iteration()
        except Exception as problem:  # noqa: BLE001 - any error ends the engine
            if isinstance(problem, TimeoutError):
                error("Engine iteration timed out. This should never happen!")
            error("Engine background task failed")
            self.dead = problem
            for request in (*self.running, *self.waiting):
                request.tokens.put_nowait(problem)

    async def _iteration(self) -> None:
        self.running = [request for request in self.running if not request.gone]
        while self.waiting and len(self.running) < self.options["max_num_seqs"]:
            self.running.append(self.waiting.popleft())
        self.metrics.queues(len(self.running), len(self.waiting))
        if not self.running:
            self.work.clear()
            if self.waiting:
                self.work.set()
            return
        if ordered("engine") == "hang":
            await asyncio.sleep(0.2)
            return
        good = await asyncio.wait_for(asyncio.to_thread(self.executor.run, "execute_model"), self.timeout)
        for request in self.running:
            self._advance(request, whole=all(good))
        self.running = [request for request in self.running if request.made < min(request.max_tokens, request.stop_at)]
        await asyncio.sleep(float(os.environ.get("GRACEFARM_STANDIN_STEP_S", "0.005")))

    def _advance(self, request: Request, *, whole: bool) -> None:
        words = TEXT.split()
        text = words[request.made % len(words)] if whole else "!"
        request.tokens.put_nowait(text if request.made == 0 or not whole else f" {text}")
        request.made += 1
        self.metrics.token(request.made, request.arrived, request.prompt_tokens)
        if request.made >= min(request.max_tokens, request.stop_at):
            request.tokens.put_nowait(None)
            reason = "stop" if request.stop_at <= request.max_tokens else "length"
            self.metrics.finished(request.made, request.arrived, reason)
