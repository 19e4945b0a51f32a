"""Limits for clients: size, time, open uploads, rate. One stalled or hostile client must not block the others."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from index.errors import TooManyError

_CLIENTS = 10_000
"Number of addresses to remember. Older ones are dropped, so that many addresses cannot fill the memory."


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits that `index serve` takes as options."""

    upload: int = 5 << 30
    "Maximum bytes of one upload, including the form."
    fields: int = 4 << 20
    "Maximum bytes of all text fields of the form together."
    idle: float = 60.0
    "Seconds after which a client is dropped that sends (or, in a download, reads) nothing."
    slowest: int = 1 << 10
    "Minimum average bytes per second of an upload, after the first `idle` seconds."
    connections_per_client: int = 256
    "Maximum open connections from one address. Above it, the most idle connections are closed."
    open_uploads: int = 32
    "Maximum concurrent uploads."
    open_uploads_per_client: int = 8
    "Maximum concurrent uploads from one address."
    waiting_uploads: int = 256
    "Maximum uploads that wait for a free place, at most half of them from one address. Their bodies are not read yet."
    longest_wait: float = 600.0
    "Maximum seconds an upload may wait."
    writes_per_second: float = 500.0
    "Write requests per second and address; bursts of up to two seconds' worth are allowed."
    failures_per_minute: float = 30.0
    "Refused tokens per minute and address."


@dataclass
class Bucket:
    """A token bucket."""

    rate: float
    burst: float
    level: float
    moment: float

    def take(self, now: float) -> bool:
        """Take one token; false if the bucket is empty."""
        self.level = min(self.burst, self.level + (now - self.moment) * self.rate)
        self.moment = now
        if self.level < 1:
            return False
        self.level -= 1
        return True


@dataclass
class ClientGate:
    """Counts current uploads, writes and refused tokens. Used from the event loop only."""

    limits: Limits
    _open: Counter[str] = field(default_factory=Counter)
    _waiting: deque[tuple[str, asyncio.Future[None]]] = field(default_factory=deque)
    _writes: dict[str, Bucket] = field(default_factory=dict)
    _failures: dict[str, Bucket] = field(default_factory=dict)

    @asynccontextmanager
    async def upload(self, client: str) -> AsyncIterator[None]:
        """Hold a place among the open uploads. If all places are taken, wait in order of arrival.

        Neither twine nor `uv publish` retries after a 429, so a short wait lets their uploads succeed.

        Raises:
            TooManyError: too many uploads are waiting already, or the wait was too long.
        """
        if self._has_place(client):
            self._open[client] += 1
        else:
            await self._wait(client)
        try:
            yield
        finally:
            self._release(client)

    def _has_place(self, client: str) -> bool:
        open_here, limits = self._open, self.limits
        return open_here[client] < limits.open_uploads_per_client and open_here.total() < limits.open_uploads

    async def _wait(self, client: str) -> None:
        own = sum(address == client for address, _ in self._waiting)
        if len(self._waiting) >= self.limits.waiting_uploads or own >= max(1, self.limits.waiting_uploads // 2):
            raise TooManyError(
                "too many uploads are waiting already", remedy="wait until some uploads have finished, then repeat the upload"
            )
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((client, turn))
        try:
            async with asyncio.timeout(self.limits.longest_wait):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():  # the place became free at the moment the wait was cancelled
                self._release(client)
            if isinstance(error, TimeoutError):
                raise TooManyError(
                    f"this upload waited {self.limits.longest_wait:g} seconds for other uploads to end",
                    remedy="upload the file again",
                ) from None
            raise
        finally:
            if (client, turn) in self._waiting:
                self._waiting.remove((client, turn))

    def _release(self, client: str) -> None:
        """Release a place, and assign free places to waiting uploads."""
        self._open[client] -= 1
        if not self._open[client]:
            del self._open[client]
        for address, turn in tuple(self._waiting):
            if self._has_place(address) and not turn.done():
                self._open[address] += 1
                self._waiting.remove((address, turn))
                turn.set_result(None)

    @property
    def open_uploads(self) -> int:
        """Number of uploads in progress."""
        return self._open.total()

    @property
    def waiting_uploads(self) -> int:
        """Number of uploads that wait for a place."""
        return len(self._waiting)

    def write(self, client: str) -> None:
        """Count a write request.

        Raises:
            TooManyError: the address exceeds the rate.
        """
        rate = self.limits.writes_per_second
        if not _bucket(self._writes, client, rate, max(2 * rate, 1)).take(time.monotonic()):
            raise TooManyError(
                f"this address sends more than {rate:g} write requests per second", remedy="wait a second, then continue"
            )

    def guessing(self, client: str) -> None:
        """Refuse to compute slow hashes for an address with too many wrong passwords.

        Raises:
            TooManyError: the address exceeds the rate of refused passwords.
        """
        bucket = self._failures.get(client)
        if bucket is not None and bucket.level + (time.monotonic() - bucket.moment) * bucket.rate < 1:
            raise TooManyError(
                "this address has sent too many wrong passwords", remedy="wait a minute, then use the correct password"
            )

    def failure(self, client: str) -> None:
        """Count a refused token.

        Raises:
            TooManyError: the address exceeds the rate.
        """
        rate = self.limits.failures_per_minute
        if not _bucket(self._failures, client, rate / 60, rate).take(time.monotonic()):
            raise TooManyError("this address has sent too many invalid tokens", remedy="wait a minute, then use a valid token")


def _bucket(buckets: dict[str, Bucket], client: str, rate: float, burst: float) -> Bucket:
    bucket = buckets.get(client)
    if bucket is None:
        while len(buckets) >= _CLIENTS:
            del buckets[next(iter(buckets))]
        bucket = buckets[client] = Bucket(rate=rate, burst=burst, level=burst, moment=time.monotonic())
    return bucket
