"""A whole file as a response, read in this process.

granian and Starlette can send a file by its path, but both read it in small pieces that each switch threads twice. Four
concurrent downloads reached 0.6 to 0.75 of nginx's rate that way, and reach 0.92 this way (docs/explanation/benchmarks.md).
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
"Bytes to read and send in one piece. A piece and its copy fit a core's cache and take the event loop about 0.1 ms."

WINDOW = 8 << 20
"Bytes that count as cached if the last one is cached. Asking for each piece would cost a fifth of the rate."


SMALLEST = 16 << 10
"Minimum bytes of a piece, for any number of downloads."

TOGETHER = 16 * PIECE
"Bytes that all downloads together may queue. With more downloads, the pieces get smaller."


@dataclass
class Downloads:
    """Counts downloads in progress. A server queues pieces for a client that does not read (granian eight), so each download
    costs memory. Used from the event loop only."""

    count: int = 0

    @contextmanager
    def count_one(self) -> Iterator[None]:
        """Count one more download inside the block."""
        self.count += 1
        try:
            yield
        finally:
            self.count -= 1

    @property
    def piece(self) -> int:
        """Bytes to read and send in one piece."""
        return max(SMALLEST, min(PIECE, TOGETHER // max(1, self.count) & -4096))


class FileAnswer(FileResponse):
    """A file. Starlette sends parts of it (Range)."""

    def __init__(self, path: Path, downloads: Downloads, *, stat_result: os.stat_result, **more: Any) -> None:
        super().__init__(path, stat_result=stat_result, **more)
        self._downloads = downloads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI.

        Raises:
            OSError: the file is unreadable, or was truncated.
        """
        with self._downloads.count_one():
            if scope["method"] != "GET" or any(name == b"range" for name, _ in scope["headers"]):
                self.chunk_size = min(self.chunk_size, self._downloads.piece)
                # Do not let granian send the file by its path: the access log would not count the bytes.
                await super().__call__({**scope, "extensions": {}}, receive, send)
            else:
                await self._whole(receive, send)

    async def _whole(self, receive: Receive, send: Send) -> None:
        # Open the file before the response starts, so that a failure can still be reported with its own status.
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
                # Sending to a client that has disconnected neither fails nor waits.
                await asyncio.sleep(0)
                if leaving.done():
                    return
                if is_cached(file, min(at + WINDOW, size) - 1):
                    cached = at + WINDOW
            if at < cached:
                piece = os.pread(file, count, at)
            else:  # the disk may be slow
                piece = await asyncio.get_running_loop().run_in_executor(None, os.pread, file, count, at)
            if count and not piece:
                raise OSError(f"{self.path} is shorter than {size} bytes")
            at += len(piece)
            await send({"type": "http.response.body", "body": piece, "more_body": at < size})
            if at >= size:
                return


async def _leaving(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def is_cached(file: int, at: int) -> bool:
    """Whether the kernel has this byte in memory. Also false if the file system cannot tell (NFS, FUSE)."""
    try:
        return bool(os.preadv(file, [bytearray(1)], max(0, at), os.RWF_NOWAIT))
    except OSError:
        return False
