"""A whole file as an answer, read in this process.

granian can send a file by its path, but reads it in small pieces that each change threads twice, and so does Starlette: four
downloads at once had 0.6 to 0.75 of nginx's rate by either, and have 0.92 so (docs/benchmarks.md).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.responses import FileResponse
from starlette.types import Receive, Scope, Send

PIECE = 384 << 10
"Bytes read and sent at once: with their copy they fit a core's cache, and take the event loop about 0.1 ms."

WINDOW = 8 << 20
"Bytes that are taken to be cached when their last one is. To ask for each piece would cost a fifth of the rate."


SMALLEST = 16 << 10
"Bytes of a piece however many downloads there are."

TOGETHER = 16 * PIECE
"Bytes that all downloads together send at once: beyond that many of them their pieces get smaller."


@dataclass
class Downloads:
    """How many are under way. A server queues pieces for who does not read (granian eight), so each costs memory. Used from
    the event loop only."""

    count: int = 0

    @contextmanager
    def count_one(self) -> Iterator[None]:
        """One more, as long as the block lasts."""
        self.count += 1
        try:
            yield
        finally:
            self.count -= 1

    @property
    def piece(self) -> int:
        """Bytes to read and send at once."""
        return max(SMALLEST, min(PIECE, TOGETHER // max(1, self.count) & -4096))


class FileAnswer(FileResponse):
    """A file; parts of it (Range) as Starlette sends them."""

    def __init__(self, path: Path, downloads: Downloads, *, stat_result: os.stat_result, **more: Any) -> None:
        super().__init__(path, stat_result=stat_result, **more)
        self._downloads = downloads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI.

        Raises:
            OSError: the file cannot be read, or has become shorter than it was.
        """
        with self._downloads.count_one():
            if scope["method"] != "GET" or any(name == b"range" for name, _ in scope["headers"]):
                self.chunk_size = min(self.chunk_size, self._downloads.piece)
                # Without granian's sending by path, which would go past the access log's count.
                await super().__call__({**scope, "extensions": {}}, receive, send)
            else:
                await self._whole(receive, send)

    async def _whole(self, receive: Receive, send: Send) -> None:
        # Opened before the answer starts, so that a failure is still an answer of its own.
        file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        leaving = asyncio.ensure_future(_leaving(receive))
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await self._send(file, leaving, send)
        finally:
            leaving.cancel()
            os.close(file)

    async def _send(self, file: int, leaving: asyncio.Future[None], send: Send) -> None:
        size, at, cached = int(self.headers["content-length"]), 0, 0
        while True:
            count = min(self._downloads.piece, size - at)
            if at >= cached:
                # To send to who has left neither fails nor waits.
                await asyncio.sleep(0)
                if leaving.done():
                    return
                if is_cached(file, min(at + WINDOW, size) - 1):
                    cached = at + WINDOW
            if at < cached:
                piece = os.pread(file, count, at)
            else:  # a disk may take its time
                piece = await asyncio.get_running_loop().run_in_executor(None, os.pread, file, count, at)
            if count and not piece:
                raise OSError(f"{self.path} has become shorter than {size} bytes")
            at += len(piece)
            await send({"type": "http.response.body", "body": piece, "more_body": at < size})
            if at >= size:
                return


async def _leaving(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def is_cached(file: int, at: int) -> bool:
    """Does the kernel have this byte in memory? False also where the file system cannot say: NFS, FUSE."""
    try:
        return bool(os.preadv(file, [bytearray(1)], max(0, at), os.RWF_NOWAIT))
    except OSError:
        return False
