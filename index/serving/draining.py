"""What still comes of a refused upload, read within bounds: a client that does not listen while it sends gets the sentence."""

from __future__ import annotations

import asyncio

from starlette.types import Message, Receive

MOST = 32 << 20
"Bytes that are read of a body that nobody wants."

LONGEST = 5.0
"Seconds that it is waited for."


class Body:
    """A request's body that knows whether it has ended."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.ended = False

    async def __call__(self) -> Message:
        """ASGI's `receive`."""
        message = await self._receive()
        self.ended = message["type"] != "http.request" or not message.get("more_body", False)
        return message


async def drain(body: Body, idle: float) -> None:
    """Read the rest; `idle` is the longest in seconds that any client may stand still."""
    count = 0
    try:
        async with asyncio.timeout(min(LONGEST, idle)):
            while not body.ended and count < MOST:
                count += len((await body()).get("body", b""))
    except TimeoutError:
        return
