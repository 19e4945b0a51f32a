"""A download under way: what it wants, how far it is, and the three ways in which it fails."""

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
"Attempts in a row without a new byte; one that brought bytes starts the count again."
FIRST_DELAY = 0.5
LONGEST_DELAY = 30.0
TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
"HTTP statuses that may be others a little later."


def mirror_remedy(url: str) -> str:
    """What to do about a server that cannot be used, with the prefix that a mirror of `url` replaces."""
    parts = urlsplit(url)
    prefix = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}/"
    return (
        f"see that this machine reaches {prefix}, or name a mirror that it reaches: GRACEFARM_MIRRORS='{prefix}=REPLACEMENT'"
    )


@dataclass(frozen=True, kw_only=True)
class Download:
    """One file by URL and digest; `what` is its name for people, `size` its length in bytes where it is known."""

    url: str
    sha256: str
    what: str
    size: int | None = None


@dataclass(kw_only=True)
class Transfer:
    """A download under way: a worker thread counts bytes, the caller's thread shows them."""

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
        """Leave the thread when the caller has given up."""
        if self.cancelled.is_set():
            raise CancelledError

    def discard(self) -> None:
        self.partial.unlink(missing_ok=True)
        self.validator.unlink(missing_ok=True)
        self.done = 0


class CancelledError(Exception):
    """Another download failed or the user interrupted; what has come so far stays for the next run."""


class TransientError(Exception):
    """This attempt failed, another may not; `delay` is the server's wish in seconds."""

    def __init__(self, reason: str, delay: float = 0.0) -> None:
        super().__init__(reason)
        self.delay = delay


def delay(failures: int, wish: float = 0.0) -> float:
    """Seconds to wait after so many failures in a row; `wish` is the server's."""
    return min(max(FIRST_DELAY * 2.0 ** (failures - 1), wish), LONGEST_DELAY)


def pause(attempt: int) -> None:
    """Wait before the attempt of that number (from 0, which does not wait)."""
    if attempt:
        time.sleep(delay(attempt))


def size_of(path: Path) -> int:
    """Its length in bytes, 0 where it is not there."""
    return path.stat().st_size if path.exists() else 0


def append(transfer: Transfer, chunks: Iterator[bytes]) -> None:
    """Write the chunks behind what is there."""
    with transfer.partial.open("ab") as stream:
        for chunk in chunks:
            stream.write(chunk)
            transfer.done += len(chunk)
            transfer.check()
        stream.flush()


def absent(transfer: Transfer, reason: str) -> FetchError:
    """The error for a file that is not where the URL says."""
    return FetchError(
        f"{transfer.download.what} is absent: {shown(transfer.url)}: {reason}",
        remedy="pin a file that exists, or name a mirror that has it: GRACEFARM_MIRRORS='PREFIX=REPLACEMENT'",
    )
