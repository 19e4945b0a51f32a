"""One streamed completion of any OpenAI-compatible server, timed as its bytes come.

A chunk is not a token: tokens are what the server counts in `usage`. Nothing here raises for what the other side does: what
went wrong is part of the answer, for a bench counts errors.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

Api = Literal["completions", "chat"]
Json = dict[str, Any]
OnText = Callable[[str], None]
Failure = Literal["refused", "http", "stream", "stall", "cut", "usage"]
"""refused: no connection; http: a status that is not 200; stream: an error in the middle of the answer; stall: no text for too
long; cut: the connection ended before the answer did; usage: the server did not count its tokens."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """Whom to ask. `url` as http://host:port, with or without /v1."""

    url: str
    key: str | None = field(default=None, repr=False)
    direct: bool = True
    "No proxy of the environment: it is this machine's loopback."

    @property
    def base(self) -> str:
        """Up to and without /v1."""
        return self.url.rstrip("/").removesuffix("/v1").rstrip("/")

    @asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        """For any number of requests at once; how long an answer may take is told by `stream`."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        timeout = httpx.Timeout(None, connect=10)
        async with httpx.AsyncClient(
            base_url=self.base, headers=headers, timeout=timeout, limits=limits, trust_env=not self.direct
        ) as made:
            yield made


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What is asked for."""

    model: str
    text: str
    max_tokens: int
    api: Api = "completions"
    to_the_end: bool = False
    "`ignore_eos`: exactly max_tokens are made. aphrodite and vLLM know it, others may refuse it."

    @property
    def path(self) -> str:
        """Below the server's base."""
        return "/v1/chat/completions" if self.api == "chat" else "/v1/completions"

    @property
    def body(self) -> Json:
        """As the API wants it."""
        said = {"messages": [{"role": "user", "content": self.text}]} if self.api == "chat" else {"prompt": self.text}
        more = {"ignore_eos": True} if self.to_the_end else {}
        counted = {"stream": True, "stream_options": {"include_usage": True}}
        return {"model": self.model, **said, "max_tokens": self.max_tokens, "temperature": 0, **counted, **more}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came back. Seconds count from the moment of asking."""

    seconds: float
    "Until the end, or until it failed."
    first: float | None = None
    "Until the first text."
    gaps: tuple[float, ...] = ()
    "Between chunks that hold text."
    prompt_tokens: int | None = None
    tokens: int | None = None
    "Made, as the server counted them; None: it did not."
    failure: Failure | None = None
    cause: str = ""
    status: int | None = None
    "HTTP's, where that was the failure."

    @property
    def chunks(self) -> int:
        """That held text."""
        return len(self.gaps) + (self.first is not None)

    @property
    def per_token(self) -> float | None:
        """Seconds between tokens after the first chunk, by the server's count."""
        if self.failure or self.first is None or not self.tokens or self.tokens < 2:
            return None
        return sum(self.gaps) / (self.tokens - 1)


@dataclass
class _Reading:
    """An answer while it comes."""

    begun: float = field(default_factory=time.perf_counter)
    first: float | None = None
    last: float = 0.0
    gaps: list[float] = field(default_factory=list)
    usage: Mapping[str, Any] = field(default_factory=dict)
    ended: bool = False
    problem: str = ""

    def take(self, chunk: Json) -> str:
        """The text of a chunk; its time, usage and error are kept."""
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

    def answer(self, failure: Failure | None = None, cause: str = "", status: int | None = None) -> Answer:
        """What there is."""
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
    """Ask, and read the answer to its end. `patience`: seconds without any text until it counts as stalled."""
    reading = _Reading()
    try:
        async with asyncio.timeout(patience) as limit:
            async with client.stream("POST", prompt.path, json=prompt.body) as response:
                if response.status_code != 200:
                    text = (await response.aread()).decode(errors="replace")
                    return reading.answer("http", f"HTTP {response.status_code}: {_said(text)}", response.status_code)
                async for chunk in _chunks(response):
                    text = reading.take(chunk) if chunk is not None else ""
                    if text:
                        limit.reschedule(asyncio.get_running_loop().time() + patience)
                        on_text(text)
                    if reading.problem or chunk is None:
                        reading.ended = True
                        break
    except TimeoutError:
        return reading.answer("stall", f"no text for {patience:g} s")
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        return reading.answer("refused", str(error) or type(error).__name__)
    except httpx.TransportError as error:
        return reading.answer("cut", str(error) or type(error).__name__)
    except (ValueError, TypeError, AttributeError) as error:
        return reading.answer("stream", f"not the stream of an OpenAI server: {error}")
    return _judge(reading)


def _judge(reading: _Reading) -> Answer:
    if reading.problem:
        return reading.answer("stream", reading.problem)
    if not reading.ended:
        return reading.answer("cut", "the stream ended before the answer did")
    if not reading.usage.get("completion_tokens"):
        return reading.answer("usage", "the server does not count tokens (stream_options.include_usage)")
    return reading.answer()


async def _chunks(response: httpx.Response) -> AsyncIterator[Json | None]:
    """Each `data:` of server-sent events; None for [DONE].

    Lines end with CR or LF alone: httpx's own splitter also takes U+2028 for an end, which may stand inside of an answer.
    """
    rest = b""
    async for block in response.aiter_bytes():
        *lines, rest = (rest + block).replace(b"\r\n", b"\n").split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                said = line[5:].strip()
                yield None if said == b"[DONE]" else json.loads(said)


def _said(text: str) -> str:
    """The server's own words out of an error's body."""
    try:
        return _words(json.loads(text))
    except ValueError:
        return (text.strip().splitlines() or ["no words"])[0][:300]


def _words(body: object) -> str:
    """`message` of OpenAI's and the engine's errors, `detail` of FastAPI's, wherever it stands."""
    if isinstance(body, dict):
        inner = body.get("error", body)
        if isinstance(inner, dict):
            inner = inner.get("message") or inner.get("detail") or inner
        body = inner
    return str(body)[:300]


async def models(client: httpx.AsyncClient) -> tuple[list[str], str, int | None]:
    """What is served, else why that cannot be told, and HTTP's status where it was that."""
    try:
        async with asyncio.timeout(30):
            response = await client.get("/v1/models")
        if response.status_code != 200:
            return [], f"HTTP {response.status_code}: {_said(response.text)}", response.status_code
        found = [str(one["id"]) for one in response.json()["data"]]
    except TimeoutError:
        return [], "no answer within 30 s", None
    except httpx.TransportError as error:
        return [], str(error) or type(error).__name__, None
    except (ValueError, KeyError, TypeError) as error:
        return [], f"not the answer of an OpenAI server: {error}", None
    return found, "" if found else "it serves no model", None
