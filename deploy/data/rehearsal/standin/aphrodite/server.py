"""The HTTP API of OpenAI and the engine. /health returns 200 even with dead workers, and a chunk is not a token."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from aiohttp import web

from aphrodite import ABOUT, __version__
from aphrodite.engine import Engine, EngineDeadError, Request
from aphrodite.log import error, say
from aphrodite.metrics import Metrics

CHUNKS = (1, 3, 2, 4)
"Numbers of tokens per chunk, used in turn."
SENTENCE = 48
"Tokens after which the model ends an answer."
Json = dict[str, Any]


class Server:
    """Serves one model at one address."""

    def __init__(self, engine: Engine, names: list[str], length: int, key: str | None, metrics: Metrics) -> None:
        self.engine = engine
        self.names = names
        self.length = length
        self.key = key
        self.metrics = metrics
        self.created = int(time.time())
        self.ended = asyncio.Event()

    def app(self) -> web.Application:
        """The routes. Only /v1 and /api require the key."""
        app = web.Application(middlewares=[self.guard])
        app.add_routes(
            [
                web.get("/health", self.health),
                web.get("/version", self.version),
                web.get("/metrics", self.scrape),
                web.get("/v1/models", self.models),
                web.post("/v1/completions", self.completions),
                web.post("/v1/chat/completions", self.chat),
                web.get("/standin/report", self.report),
            ]
        )
        return app

    @web.middleware  # type: ignore[untyped-decorator]
    async def guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        """Answer 401 without the key, and end the server if the engine is dead."""
        if self.key and request.path.startswith(("/v1", "/api")):
            given = request.headers.get("Authorization")
            if given != f"Bearer {self.key}" and request.headers.get("x-api-key") != self.key:
                return web.json_response({"error": "Unauthorized"}, status=401)
        try:
            response: web.StreamResponse = await handler(request)
        except EngineDeadError:
            self.end()
            return web.Response(status=500)
        return response

    def end(self) -> None:
        """End the server process, like the engine does when it is dead, unless it is configured not to."""
        if not os.environ.get("APHRODITE_KEEP_ALIVE_ON_ENGINE_DEATH"):
            error("AsyncAphrodite is already dead, terminating server process")
            asyncio.get_running_loop().call_later(0.2, self.ended.set)

    async def health(self, _request: web.Request) -> web.Response:
        """Always 200, like the engine with Ray."""
        return web.Response(status=200)

    async def version(self, _request: web.Request) -> web.Response:
        """The version of the engine. The log says that this is a simulation."""
        return web.json_response({"version": __version__})

    async def scrape(self, _request: web.Request) -> web.Response:
        """Metrics for Prometheus."""
        return web.Response(body=self.metrics.text(), content_type="text/plain")

    async def models(self, _request: web.Request) -> web.Response:
        """The served model."""
        rows = [
            {"id": name, "object": "model", "created": self.created, "owned_by": "pygmalionai", "max_model_len": self.length}
            for name in self.names
        ]
        return web.json_response({"object": "list", "data": rows})

    async def report(self, _request: web.Request) -> web.Response:
        """For tests: every rank with its environment."""
        ranks = await asyncio.to_thread(self.engine.executor.run, "report")
        return web.json_response({"about": ABOUT, "ranks": ranks, "blocks": self.engine.executor.blocks})

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """Complete a prompt."""
        return await self.complete(request, chat=False)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """Answer messages."""
        return await self.complete(request, chat=True)

    async def complete(self, request: web.Request, *, chat: bool) -> web.StreamResponse:
        """Answer in one piece or as a stream."""
        try:
            body = await request.json()
            name = body["model"]
            given = json.dumps(body["messages"]) if chat else body["prompt"]
        except (ValueError, KeyError, TypeError) as problem:
            return refusal(f"{problem!r} is missing or not understood", "BadRequestError", 400)
        if name not in self.names:
            return refusal(f"The model `{name}` does not exist.", "NotFoundError", 404)
        prompt = len(given) if isinstance(given, list) else max(1, len(given) // 4)
        wanted = body.get("max_tokens") or body.get("max_completion_tokens") or (self.length - prompt if chat else 16)
        if prompt + wanted > self.length:
            return refusal(
                f"This model's maximum context length is {self.length} tokens. However, you requested {prompt + wanted} "
                f"tokens ({prompt} in the {'messages' if chat else 'prompt'}, {wanted} in the completion).",
                "BadRequestError",
                400,
            )
        stop_at = wanted + 1 if body.get("ignore_eos") else max(SENTENCE, body.get("min_tokens", 0))
        kind = "chatcmpl" if chat else "cmpl"
        work = Request(id=f"{kind}-{uuid.uuid4().hex}", prompt_tokens=prompt, max_tokens=wanted, stop_at=stop_at)
        if body.get("stream"):
            return await self.stream(request, body, work, chat=chat)
        text = "".join([token async for token in self.engine.generate(work)])
        return web.json_response(
            {**self.head(work, name, chat=chat), "choices": [choice(work, text, chat)], "usage": usage(work)}
        )

    def head(self, work: Request, name: str, *, chat: bool, chunk: bool = False) -> Json:
        """The common fields of all answers."""
        what = ("chat.completion.chunk" if chunk else "chat.completion") if chat else "text_completion"
        return {"id": work.id, "object": what, "created": int(time.time()), "model": name}

    async def stream(self, request: web.Request, body: Json, work: Request, *, chat: bool) -> web.StreamResponse:
        """Answer with server-sent events."""
        counted = bool((body.get("stream_options") or {}).get("include_usage"))
        head = self.head(work, body["model"], chat=chat, chunk=True)
        extra = {"usage": None} if counted else {}
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        tokens = self.engine.generate(work)
        first = await anext(tokens)  # before the headers, so that a dead engine gives a 500 instead of a broken stream
        await response.prepare(request)

        async def send(choices: list[Json], **more: Any) -> None:
            line = json.dumps({**head, "choices": choices, **extra, **more})
            await response.write(f"data: {line}\n\n".encode())

        try:
            if chat:
                await send([{"index": 0, "delta": {"role": "assistant"}, "finish_reason": None}])
            async for text in joined(first, tokens):
                await send([piece(text, chat)])
            await send([piece("", chat, reason(work))])
            if counted:
                await send([], usage=usage(work))
            await response.write(b"data: [DONE]\n\n")
        except EngineDeadError as problem:
            body = {"object": "error", "message": str(problem), "type": "InternalServerError", "param": None, "code": 500}
            await response.write(f"data: {json.dumps(body)}\n\ndata: [DONE]\n\n".encode())
            self.end()
        await response.write_eof()
        return response


async def joined(first: str, rest: AsyncIterator[str]) -> AsyncIterator[str]:
    """Join tokens to chunks of different sizes."""
    sizes = itertools.cycle(CHUNKS)
    held, size = [first], next(sizes)
    if len(held) == size:
        yield first
        held, size = [], next(sizes)
    async for token in rest:
        held.append(token)
        if len(held) >= size:
            yield "".join(held)
            held, size = [], next(sizes)
    if held:
        yield "".join(held)


def reason(work: Request) -> str:
    """Why a request ended."""
    return "stop" if work.stop_at <= work.max_tokens else "length"


def piece(text: str, chat: bool, why: str | None = None) -> Json:
    """The choice of a chunk."""
    return {"index": 0, **({"delta": {"content": text}} if chat else {"text": text}), "logprobs": None, "finish_reason": why}


def choice(work: Request, text: str, chat: bool) -> Json:
    """The choice of a whole answer."""
    content = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    return {"index": 0, **content, "logprobs": None, "finish_reason": reason(work)}


def usage(work: Request) -> Json:
    """The numbers of tokens, counted by the engine."""
    return {
        "prompt_tokens": work.prompt_tokens,
        "completion_tokens": work.made,
        "total_tokens": work.prompt_tokens + work.made,
    }


def refusal(message: str, kind: str, code: int) -> web.Response:
    """An error in the engine's format."""
    body = {"object": "error", "message": message, "type": kind, "param": None, "code": code}
    return web.json_response(body, status=code)


async def serve(server: Server, host: str | None, port: int) -> None:
    """Listen until the engine dies or a signal arrives. Raises OSError for a port in use, after loading like the engine."""
    import signal

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, server.ended.set)
    task = asyncio.create_task(server.engine.loop())
    runner = web.AppRunner(server.app(), handler_cancellation=True)
    say(f"Started server process [{os.getpid()}]")
    say("Waiting for application startup.")
    await runner.setup()
    say("Application startup complete.")
    await web.TCPSite(runner, host, port, shutdown_timeout=2).start()
    say(f"Uvicorn running on http://{host or '0.0.0.0'}:{port} (Press CTRL+C to quit)")  # noqa: S104 - the engine's default
    await server.ended.wait()
    say("Gracefully stopping http server")
    task.cancel()
    await runner.cleanup()
