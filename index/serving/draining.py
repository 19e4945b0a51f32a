"""Read the rest of a refused upload, within limits, so that a client that only reads after sending gets the error message."""

from __future__ import annotations

import asyncio

from starlette.types import Message, Receive

MOST = 32 << 20
"Maximum bytes to read of a refused body."

LONGEST = 5.0
"Maximum seconds to wait for it."


class Body:
    """A request's body that remembers whether it has ended."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.ended = False

    async def __call__(self) -> Message:
        """ASGI's `receive`."""
        message = await self._receive()
        self.ended = message["type"] != "http.request" or not message.get("more_body", False)
        return message


async def drain(body: Body, idle: float) -> None:
    """Read the rest; `idle` is the maximum number of seconds without data."""
    count = 0
    try:
        async with asyncio.timeout(min(LONGEST, idle)):
            while not body.ended and count < MOST:
                count += len((await body()).get("body", b""))
    except TimeoutError:
        return
