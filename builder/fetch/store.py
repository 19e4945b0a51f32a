"""The content-addressed store: a file in it is complete and verified.

    HOME/store/sha256/ab/<sha256>             the file, read-only
    HOME/store/sha256/ab/<sha256>.partial     the received part; the next run continues from it
    HOME/store/sha256/ab/<sha256>.validator   the ETag or date that the partial file belongs to (RFC 9110, If-Range)
    HOME/store/locks/<sha256>                 held while one process fetches that file

Any number of processes may fetch into one store: the first takes the lock of the digest, the others wait and find the file.
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
"One attempt to get the missing part over HTTP."


def store_path(settings: Settings, sha256: str) -> Path:
    """Path of the file with that digest; it exists only when complete and verified."""
    return settings.home / "store" / "sha256" / sha256[:2] / sha256


def download(downloads: Sequence[Download], settings: Settings, tick: Tick = no_tick) -> dict[str, Path]:
    """Fetch the files into the store, eight at a time, and return their paths by sha256.

    Files that are in the store are not fetched again. `tick` gets bytes, in the caller's thread.

    Raises:
        FetchError: a file does not exist (404) or cannot be reached after all retries.
        DigestError: the file differs from its pin; it was not kept.
        DiskFullError: no space left; the received part is kept for the next run.
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
    """Download in threads, show progress in this one; the first failure stops the others after the current chunk."""
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
    """Fetch one file into the store, under its lock."""
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
    """Complete the partial file, with a limited number of retries without a new byte.

    Raises:
        FetchError: the file does not exist or cannot be reached.
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
                    f"{transfer.download.what}: {shown(transfer.url)} cannot be fetched: {shown(str(error))} ({ATTEMPTS} "
                    "attempts in a row received no new data)",
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
            f"{transfer.download.what}: {shown(transfer.url)} is not an http, https or file URL",
            remedy="correct the URL in the recipe, the stack or GRACEFARM_MIRRORS",
        )


def _copy(transfer: Transfer) -> None:
    """Copy a local file from its beginning, since resuming a local copy saves nothing."""
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
    """Compare digests; if a resumed file has a wrong one, fetch it again from its beginning."""
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
        f"{transfer.download.what}: {shown(transfer.url)} has sha256 {got} ({size} bytes), but {expected} is pinned",
        remedy="ask the publisher of the file for its sha256; if the pinned digest is wrong, correct it; the fetched file was "
        "not kept",
    )


def publish(transfer: Transfer, path: Path) -> None:
    """Move the partial file to its path in the store."""
    with transfer.partial.open("rb") as stream:
        os.fsync(stream.fileno())
    transfer.partial.chmod(0o444)
    path.parent.mkdir(parents=True, exist_ok=True)
    transfer.partial.rename(path)
    transfer.validator.unlink(missing_ok=True)
    sync_directory(path.parent)
    transfer.done = transfer.total = path.stat().st_size
