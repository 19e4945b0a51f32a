"""The content-addressed store: a file is in it whole and verified, or not at all.

    HOME/store/sha256/ab/<sha256>             the file, read-only
    HOME/store/sha256/ab/<sha256>.partial     what has come so far; the next run goes on from it
    HOME/store/sha256/ab/<sha256>.validator   the ETag or date that the partial file belongs to (RFC 9110, If-Range)
    HOME/store/locks/<sha256>                 held while one process fetches that file

Any number of processes may fetch into one store: the first takes the digest's lock, the others wait and find the file.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from builder.fetch.transfer import ATTEMPTS, Download, Transfer, TransientError, absent, append, delay, mirror_remedy, size_of
from builder.fetch.urls import shown
from builder.planning.settings import Settings
from gracefarm.console import Tick, no_tick
from gracefarm.errors import DigestError, FetchError
from gracefarm.files import CHUNK, full_disk, lock, sha256_file, sync_directory

WORKERS = 8
Request = Callable[[Transfer], None]
"One attempt to get what is missing over HTTP."


def store_path(settings: Settings, sha256: str) -> Path:
    """Where the store keeps the file of that digest; it is there only when whole and verified."""
    return settings.home / "store" / "sha256" / sha256[:2] / sha256


def download(downloads: Sequence[Download], settings: Settings, tick: Tick = no_tick) -> dict[str, Path]:
    """Bring the files into the store, eight at a time, and return their places by sha256.

    What is there already costs no network. `tick` gets bytes, in the caller's thread.

    Raises:
        FetchError: a file is absent (404) or cannot be reached after bounded retries.
        DigestError: other bytes came than were pinned; they were not kept.
        DiskFullError: no space; what came stays for the next run.
    """
    places = {file.sha256: store_path(settings, file.sha256) for file in downloads}
    missing = {file.sha256: file for file in downloads if not places[file.sha256].exists()}
    if missing:
        cancelled = threading.Event()
        transfers = [
            Transfer(
                download=file, url=settings.redirect(file.url), path=places[file.sha256], cancelled=cancelled, total=file.size
            )
            for file in missing.values()
        ]
        _run(transfers, settings, cancelled, tick)
    return places


def _run(transfers: list[Transfer], settings: Settings, cancelled: threading.Event, tick: Tick) -> None:
    """Work in threads, show progress from this one; the first failure stops the others between two chunks."""
    # httpx takes longer to import than `builder build` takes to find that a build exists.
    from builder.fetch import web

    with web.requests() as request, ThreadPoolExecutor(min(WORKERS, len(transfers)), thread_name_prefix="fetch") as pool:
        try:
            futures = {pool.submit(_bring, transfer, settings, request): transfer for transfer in transfers}
            pending: set[Future[None]] = set(futures)
            while pending:
                finished, pending = wait(pending, timeout=0.1, return_when=FIRST_EXCEPTION)
                _show(futures, pending, tick)
                for future in finished:
                    future.result()
        finally:
            cancelled.set()
            pool.shutdown(cancel_futures=True)


def _show(futures: dict[Future[None], Transfer], pending: set[Future[None]], tick: Tick) -> None:
    transfers = list(futures.values())
    totals = [transfer.total for transfer in transfers]
    total = None if None in totals else sum(size for size in totals if size is not None)
    active = next((transfer.download.what for future, transfer in futures.items() if future in pending and transfer.done), "")
    tick(
        sum(transfer.done for transfer in transfers),
        total,
        f"{len(futures) - len(pending)} of {len(futures)} files  {active}".rstrip(),
    )


def _bring(transfer: Transfer, settings: Settings, request: Request) -> None:
    """One file into the store, under its lock."""
    sha256 = transfer.download.sha256
    with full_disk(settings.home):
        transfer.path.parent.mkdir(parents=True, exist_ok=True)
        with lock(settings.home / "store" / "locks" / sha256, keep_waiting=transfer.check):
            if transfer.path.exists():
                transfer.done = transfer.total = transfer.path.stat().st_size
                return
            receive(transfer, request)
            _verify(transfer, request)
            publish(transfer, transfer.path)


def receive(transfer: Transfer, request: Request) -> None:
    """Fill the partial file, with bounded retries while no new byte comes.

    Raises:
        FetchError: it is absent or cannot be reached.
    """
    failures, furthest = 0, size_of(transfer.partial)
    while True:
        transfer.check()
        try:
            _attempt(transfer, request)
        except TransientError as error:
            reached = size_of(transfer.partial)
            failures = 1 if reached > furthest else failures + 1
            furthest = max(furthest, reached)
            if failures >= ATTEMPTS:
                raise FetchError(
                    f"{transfer.download.what}: {shown(transfer.url)} cannot be had: {shown(str(error))} "
                    f"({ATTEMPTS} attempts without a new byte)",
                    remedy=mirror_remedy(transfer.download.url),
                ) from error
            transfer.cancelled.wait(delay(failures, error.delay))
        else:
            return


def _attempt(transfer: Transfer, request: Request) -> None:
    scheme = urlsplit(transfer.url).scheme
    if scheme == "file":
        _copy(transfer)
    elif scheme in ("http", "https"):
        request(transfer)
    else:
        raise FetchError(
            f"{transfer.download.what}: {shown(transfer.url)} is not an http, https or file URL", remedy="mend the URL"
        )


def _copy(transfer: Transfer) -> None:
    """A file of this machine; copied from its beginning, for nothing is saved by going on."""
    place = Path(url2pathname(urlsplit(transfer.url).path))
    transfer.discard()
    try:
        source = place.open("rb")
    except OSError as error:
        raise absent(transfer, (error.strerror or "cannot be read").lower()) from error
    with source:
        transfer.total = os.fstat(source.fileno()).st_size
        append(transfer, iter(lambda: source.read(CHUNK), b""))


def _verify(transfer: Transfer, request: Request) -> None:
    """Compare digests; a wrong one after going on from an earlier run's bytes is given one fresh start."""
    expected = transfer.download.sha256
    got = sha256_file(transfer.partial)
    if got != expected and transfer.resumed:
        transfer.discard()
        receive(transfer, request)
        got = sha256_file(transfer.partial)
    if got == expected:
        return
    size = size_of(transfer.partial)
    transfer.discard()
    raise DigestError(
        f"{transfer.download.what}: {shown(transfer.url)} has sha256 {got} ({size} bytes), pinned is {expected}",
        remedy="the file was not kept; find out why it differs before you pin another digest",
    )


def publish(transfer: Transfer, path: Path) -> None:
    """Make the partial file the store's file at `path`."""
    with transfer.partial.open("rb") as stream:
        os.fsync(stream.fileno())
    transfer.partial.chmod(0o444)
    path.parent.mkdir(parents=True, exist_ok=True)
    transfer.partial.rename(path)
    transfer.validator.unlink(missing_ok=True)
    sync_directory(path.parent)
    transfer.done = transfer.total = path.stat().st_size
