"""Completions of an OpenAI-compatible server: streamed, with the time of each chunk, or whole.

A chunk is not a token: the server counts tokens in `usage`. `stream` does not raise errors of the server, but returns them in
the answer, since a benchmark counts them.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

from deploy.remote.wire import Json

Api = Literal["completions", "chat"]
OnText = Callable[[str], None]
FailureKind = Literal["refused", "http", "stream", "stall", "cut", "usage"]
"""refused: no connection; http: a status other than 200; stream: an error within the answer; stall: no text for too long; cut:
the connection ended before the answer; usage: the server did not count the tokens."""


@dataclass(frozen=True, kw_only=True)
class CompletionServer:
    """A server. `url` is http://host:port, with or without /v1."""

    url: str
    key: str | None = field(default=None, repr=False)
    direct: bool = True
    "Ignore proxies of the environment, for a server on the loopback."

    @property
    def base(self) -> str:
        """The URL without /v1."""
        return self.url.rstrip("/").removesuffix("/v1").rstrip("/")

    @asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        """A client for any number of concurrent requests. It has no timeout; `stream` has one."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        timeout = httpx.Timeout(None, connect=10)
        async with httpx.AsyncClient(
            base_url=self.base, headers=headers, timeout=timeout, limits=limits, trust_env=not self.direct
        ) as client:
            yield client


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """The content of a request."""

    model: str
    text: str
    max_tokens: int
    api: Api = "completions"
    to_the_end: bool = False
    "Set `ignore_eos`, to get exactly max_tokens. Aphrodite and vLLM support it; other servers may refuse it."

    @property
    def path(self) -> str:
        """The path of the API."""
        return "/v1/chat/completions" if self.api == "chat" else "/v1/completions"

    @property
    def body(self) -> Json:
        """The JSON body for the API."""
        asked = {"messages": [{"role": "user", "content": self.text}]} if self.api == "chat" else {"prompt": self.text}
        more = {"ignore_eos": True} if self.to_the_end else {}
        return {"model": self.model, **asked, "max_tokens": self.max_tokens, "temperature": 0, **more}


class CompletionError(Exception):
    """A request that failed. `status`: the HTTP status, if that was the failure."""

    def __init__(self, kind: FailureKind, cause: str, status: int | None = None) -> None:
        super().__init__(cause)
        self.kind, self.cause, self.status = kind, cause, status


@contextmanager
def _failures(late: str, form: str) -> Iterator[None]:
    """Convert exceptions to `CompletionError`. `late`: message for a timeout. `form`: what was expected."""
    try:
        yield
    except TimeoutError as error:
        raise CompletionError("stall", late) from error
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise CompletionError("refused", str(error) or type(error).__name__) from error
    except httpx.TransportError as error:
        raise CompletionError("cut", str(error) or type(error).__name__) from error
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise CompletionError("stream", f"the {form} is not in OpenAI's format: {error}") from error


def _require(response: httpx.Response) -> None:
    """Raise CompletionError if the status is not 200. The body must have been read."""
    if response.status_code != 200:
        words = _words_of(response.text)
        cause = f"HTTP {response.status_code}{': ' + words if words else ''}"
        raise CompletionError("http", cause, response.status_code)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer. Seconds are counted from the request."""

    seconds: float
    "Seconds until the end, or until it failed."
    first: float | None = None
    "Seconds until the first text."
    gaps: tuple[float, ...] = ()
    "Seconds between chunks with text."
    prompt_tokens: int | None = None
    tokens: int | None = None
    "Generated tokens, as counted by the server; None: not counted."
    failure: FailureKind | None = None
    cause: str = ""
    status: int | None = None
    "The HTTP status, if that was the failure."

    @property
    def chunks(self) -> int:
        """Number of chunks with text."""
        return len(self.gaps) + (self.first is not None)

    @property
    def per_token(self) -> float | None:
        """Mean seconds between tokens after the first chunk, with the server's count of tokens."""
        if self.failure or self.first is None or not self.tokens or self.tokens < 2:
            return None
        return sum(self.gaps) / (self.tokens - 1)


@dataclass
class _Reading:
    """An answer while it arrives."""

    begun: float = field(default_factory=time.perf_counter)
    first: float | None = None
    last: float = 0.0
    gaps: list[float] = field(default_factory=list)
    usage: Mapping[str, Any] = field(default_factory=dict)
    ended: bool = False
    problem: str = ""

    def take(self, chunk: Json) -> str:
        """Return the text of a chunk, and store its time, usage and error."""
        if "error" in chunk or chunk.get("object") == "error":
            self.problem = _words(chunk)
            return ""
        self.usage = chunk.get("usage") or self.usage
        text = ""
        for choice in chunk.get("choices") or []:
            delta = choice.get("delta") or {}
            text += choice.get("text") or delta.get("content") or delta.get("reasoning_content") or ""
            self.ended = self.ended or choice.get("finish_reason") is not None
        if text:
            now = time.perf_counter() - self.begun
            if self.first is None:
                self.first = now
            else:
                self.gaps.append(now - self.last)
            self.last = now
        return text

    def answer(self, failure: FailureKind | None = None, cause: str = "", status: int | None = None) -> Answer:
        """The answer so far."""
        return Answer(
            seconds=time.perf_counter() - self.begun,
            first=self.first,
            gaps=tuple(self.gaps),
            prompt_tokens=self.usage.get("prompt_tokens"),
            tokens=self.usage.get("completion_tokens"),
            failure=failure,
            cause=cause,
            status=status,
        )


async def stream(
    client: httpx.AsyncClient, prompt: Prompt, *, patience: float = 120.0, on_text: OnText = lambda _text: None
) -> Answer:
    """Request a streamed answer and read it. `patience`: seconds without text after which it counts as stalled."""
    reading = _Reading()
    body = {**prompt.body, "stream": True, "stream_options": {"include_usage": True}}
    try:
        with _failures(f"no text for {patience:g} s", "stream"):
            async with asyncio.timeout(patience) as limit, client.stream("POST", prompt.path, json=body) as response:
                if response.status_code != 200:
                    await response.aread()
                    _require(response)
                async for chunk in _chunks(response):
                    text = reading.take(chunk) if chunk is not None else ""
                    if text:
                        limit.reschedule(asyncio.get_running_loop().time() + patience)
                        on_text(text)
                    if reading.problem or chunk is None:
                        reading.ended = True
                        break
    except CompletionError as failure:
        return reading.answer(failure.kind, failure.cause, failure.status)
    return _judge(reading)


async def whole(client: httpx.AsyncClient, prompt: Prompt) -> None:
    """Request an answer in one piece. It has no timeout. Raises CompletionError."""
    with _failures("no answer", "answer"):
        response = await client.post(prompt.path, json=prompt.body)
        _require(response)
        if not response.json()["choices"]:
            raise CompletionError("stream", "the answer has no choices")


def _judge(reading: _Reading) -> Answer:
    if reading.problem:
        return reading.answer("stream", reading.problem)
    if not reading.ended:
        return reading.answer("cut", "the stream ended before the answer")
    if not reading.usage.get("completion_tokens"):
        return reading.answer("usage", "the server does not count tokens (stream_options.include_usage)")
    return reading.answer()


async def _chunks(response: httpx.Response) -> AsyncIterator[Json | None]:
    """Each `data:` of server-sent events; None for [DONE].

    Lines end only with CR or LF. The splitter of httpx also splits at U+2028, which may occur in an answer.
    """
    rest = b""
    async for block in response.aiter_bytes():
        *lines, rest = (rest + block).replace(b"\r\n", b"\n").split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                data = line[5:].strip()
                yield None if data == b"[DONE]" else json.loads(data)


def _words_of(text: str) -> str:
    """The message in the body of an error."""
    try:
        return _words(json.loads(text))
    except ValueError:
        return text.strip().partition("\n")[0][:300]


def _words(body: object) -> str:
    """The `message` of an error of OpenAI or the engine, or the `detail` of FastAPI."""
    if isinstance(body, dict):
        inner = body.get("error", body)
        if isinstance(inner, dict):
            inner = inner.get("message") or inner.get("detail") or inner
        body = inner
    return str(body)[:300]


async def models(client: httpx.AsyncClient, seconds: float = 30) -> list[str]:
    """The names of the served models, at least one. Raises CompletionError."""
    with _failures(f"no answer within {seconds:g} s", "answer"):
        async with asyncio.timeout(seconds):
            response = await client.get("/v1/models")
        _require(response)
        names = [str(model["id"]) for model in response.json()["data"]]
    if not names:
        raise CompletionError("stream", "the server has no models")
    return names
