"""A running download: its file, its progress, and the three ways in which it fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from builder.fetch.urls import shown
from gracefarm.errors import FetchError

ATTEMPTS = 4
"Attempts in a row without a new byte; an attempt that received bytes resets the count."
FIRST_DELAY = 0.5
LONGEST_DELAY = 30.0
TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
"HTTP statuses of temporary failures."


def mirror_remedy(url: str) -> str:
    """The remedy for a server that cannot be used, with the prefix that a mirror of `url` replaces."""
    parts = urlsplit(url)
    prefix = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}/"
    return (
        f"check the network to {prefix}, or set a mirror that this machine can reach: GRACEFARM_MIRRORS='{prefix}=REPLACEMENT'"
    )


@dataclass(frozen=True, kw_only=True)
class Download:
    """One file by URL and digest; `what` is its name in messages, `size` its length in bytes, if known."""

    url: str
    sha256: str
    what: str
    size: int | None = None


@dataclass(kw_only=True)
class Transfer:
    """A running download: a worker thread counts bytes, the caller's thread shows them."""

    download: Download
    url: str
    path: Path
    cancelled: threading.Event
    total: int | None = None
    done: int = 0
    resumed: bool = False

    @property
    def partial(self) -> Path:
        return self.path.with_name(f"{self.path.name}.partial")

    @property
    def validator(self) -> Path:
        return self.path.with_name(f"{self.path.name}.validator")

    def check(self) -> None:
        """Raise if the caller has cancelled the download."""
        if self.cancelled.is_set():
            raise CancelledError

    def discard(self) -> None:
        self.partial.unlink(missing_ok=True)
        self.validator.unlink(missing_ok=True)
        self.done = 0


class CancelledError(Exception):
    """Another download failed, or the user interrupted the command. The received part is kept for the next run."""


class TransientError(Exception):
    """A temporary failure. `delay` is the number of seconds that the server asks to wait."""

    def __init__(self, reason: str, delay: float = 0.0) -> None:
        super().__init__(reason)
        self.delay = delay


def delay(failures: int, wish: float = 0.0) -> float:
    """Seconds to wait after this number of failures in a row; `wish` is the delay that the server asks for."""
    return min(max(FIRST_DELAY * 2.0 ** (failures - 1), wish), LONGEST_DELAY)


def pause(attempt: int) -> None:
    """Wait before an attempt, except before attempt 0."""
    if attempt:
        time.sleep(delay(attempt))


def size_of(path: Path) -> int:
    """The file's length in bytes, 0 if it does not exist."""
    return path.stat().st_size if path.exists() else 0


def append(transfer: Transfer, chunks: Iterator[bytes]) -> None:
    """Append the chunks to the partial file."""
    with transfer.partial.open("ab") as stream:
        for chunk in chunks:
            stream.write(chunk)
            transfer.done += len(chunk)
            transfer.check()
        stream.flush()


def absent(transfer: Transfer, reason: str) -> FetchError:
    """The error for a file that does not exist at its URL."""
    return FetchError(
        f"{transfer.download.what} does not exist: {shown(transfer.url)}: {reason}",
        remedy="pin a file that exists, or set a mirror that has the file: GRACEFARM_MIRRORS='PREFIX=REPLACEMENT'",
    )
