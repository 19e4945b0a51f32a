"""The canary: a real completion of one token. An engine's /health is not used, since it returns 200 with dead workers."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Literal

from deploy.engine import completion
from deploy.engine.completion import CompletionError, CompletionServer, Prompt

ReplyKind = Literal["ok", "refused", "timeout", "denied", "error"]
_KINDS: dict[str, ReplyKind] = {"refused": "refused", "cut": "refused", "stall": "timeout"}


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The result of a canary."""

    kind: ReplyKind
    text: str = ""
    seconds: float = 0.0
    model: str = ""


async def ask_one_token(local: int, key: str | None, seconds: float) -> Reply:
    """Request one token from 127.0.0.1:`local`. Errors of the server are part of the result."""
    begun, model = time.monotonic(), ""
    late = f"no token within {seconds:g} s"
    try:
        async with asyncio.timeout(seconds), CompletionServer(url=f"http://127.0.0.1:{local}", key=key).client() as client:
            model = (await completion.models(client, seconds))[0]
            await completion.whole(client, Prompt(model=model, text="Hello", max_tokens=1))
    except TimeoutError:
        return Reply(kind="timeout", text=late, seconds=seconds, model=model)
    except CompletionError as failure:
        kind = "denied" if failure.status in (401, 403) else _KINDS.get(failure.kind, "error")
        return Reply(
            kind=kind, text=late if kind == "timeout" else failure.cause, seconds=time.monotonic() - begun, model=model
        )
    return Reply(kind="ok", seconds=time.monotonic() - begun, model=model)
