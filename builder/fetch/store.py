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
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import httpx

from builder.fetch.urls import shown, split_credentials
from gracefarm.console import Tick, no_tick
from gracefarm.errors import DigestError, FetchError
from gracefarm.files import CHUNK, full_disk, lock, sha256_file, sync_directory
from gracefarm.settings import Settings

WORKERS = 8
ATTEMPTS = 4
"Attempts in a row without a new byte; one that brought bytes starts the count again."
FIRST_DELAY = 0.5
LONGEST_DELAY = 30.0
TIMEOUT = httpx.Timeout(30.0, connect=15.0)
TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
MIRROR_REMEDY = (
    "see that this machine reaches that host, or name a mirror that it reaches: GRACEFARM_MIRRORS='PREFIX=REPLACEMENT'"
)


@dataclass(frozen=True, kw_only=True)
class Download:
    """One file by URL and digest; `what` is its name for people, `size` its length in bytes where it is known."""

    url: str
    sha256: str
    what: str
    size: int | None = None


@dataclass(kw_only=True)
class _Transfer:
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
            raise _CancelledError

    def discard(self) -> None:
        self.partial.unlink(missing_ok=True)
        self.validator.unlink(missing_ok=True)
        self.done = 0


class _CancelledError(Exception):
    """Another download failed or the user interrupted; what has come so far stays for the next run."""


class _TransientError(Exception):
    """This attempt failed, another may not; `delay` is the server's wish in seconds."""

    def __init__(self, reason: str, delay: float = 0.0) -> None:
        super().__init__(reason)
        self.delay = delay


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
    places = {one.sha256: store_path(settings, one.sha256) for one in downloads}
    missing = {one.sha256: one for one in downloads if not places[one.sha256].exists()}
    if missing:
        cancelled = threading.Event()
        transfers = [
            _Transfer(
                download=one, url=settings.redirect(one.url), path=places[one.sha256], cancelled=cancelled, total=one.size
            )
            for one in missing.values()
        ]
        _run(transfers, settings, cancelled, tick)
    return places


def _run(transfers: list[_Transfer], settings: Settings, cancelled: threading.Event, tick: Tick) -> None:
    """Work in threads, show progress from this one; the first failure stops the others between two chunks."""
    with _client() as client, ThreadPoolExecutor(min(WORKERS, len(transfers)), thread_name_prefix="fetch") as pool:
        try:
            futures = {pool.submit(_bring, one, settings, client): one for one in transfers}
            pending: set[Future[None]] = set(futures)
            while pending:
                finished, pending = wait(pending, timeout=0.1, return_when=FIRST_EXCEPTION)
                _show(futures, pending, tick)
                for future in finished:
                    future.result()
        finally:
            cancelled.set()
            pool.shutdown(cancel_futures=True)


def _show(futures: dict[Future[None], _Transfer], pending: set[Future[None]], tick: Tick) -> None:
    transfers = list(futures.values())
    totals = [one.total for one in transfers]
    total = None if None in totals else sum(size for size in totals if size is not None)
    active = next((one.download.what for future, one in futures.items() if future in pending and one.done), "")
    tick(
        sum(one.done for one in transfers), total, f"{len(futures) - len(pending)} of {len(futures)} files  {active}".rstrip()
    )


def _client() -> httpx.Client:
    # identity: a .tar.gz must come as the bytes that were pinned, not as what a server's compression makes of them.
    return httpx.Client(
        timeout=TIMEOUT, follow_redirects=True, headers={"Accept-Encoding": "identity", "User-Agent": "gracefarm"}
    )


def _bring(transfer: _Transfer, settings: Settings, client: httpx.Client) -> None:
    """One file into the store, under its lock."""
    sha256 = transfer.download.sha256
    with full_disk(settings.home):
        transfer.path.parent.mkdir(parents=True, exist_ok=True)
        with lock(settings.home / "store" / "locks" / sha256, keep_waiting=transfer.check):
            if transfer.path.exists():
                transfer.done = transfer.total = transfer.path.stat().st_size
                return
            _receive(transfer, client)
            _verify(transfer, client)
            _publish(transfer)


def _receive(transfer: _Transfer, client: httpx.Client) -> None:
    """Fill the partial file, with bounded retries while no new byte comes."""
    failures, furthest = 0, _size(transfer.partial)
    while True:
        transfer.check()
        try:
            _attempt(transfer, client)
        except _TransientError as error:
            reached = _size(transfer.partial)
            failures = 1 if reached > furthest else failures + 1
            furthest = max(furthest, reached)
            if failures >= ATTEMPTS:
                raise FetchError(
                    f"{transfer.download.what}: {shown(transfer.url)} cannot be had: {shown(str(error))} "
                    f"({ATTEMPTS} attempts without a new byte)",
                    remedy=MIRROR_REMEDY,
                ) from error
            transfer.cancelled.wait(min(max(FIRST_DELAY * 2 ** (failures - 1), error.delay), LONGEST_DELAY))
        else:
            return


def _attempt(transfer: _Transfer, client: httpx.Client) -> None:
    scheme = urlsplit(transfer.url).scheme
    if scheme == "file":
        _copy(transfer)
    elif scheme in ("http", "https"):
        _request(transfer, client)
    else:
        raise FetchError(
            f"{transfer.download.what}: {shown(transfer.url)} is not an http, https or file URL", remedy="mend the URL"
        )


def _copy(transfer: _Transfer) -> None:
    """A file of this machine; copied from its beginning, for nothing is saved by going on."""
    place = Path(url2pathname(urlsplit(transfer.url).path))
    transfer.discard()
    try:
        source = place.open("rb")
    except OSError as error:
        raise _absent(transfer, (error.strerror or "cannot be read").lower()) from error
    with source:
        transfer.total = os.fstat(source.fileno()).st_size
        _append(transfer, iter(lambda: source.read(CHUNK), b""))


def _request(transfer: _Transfer, client: httpx.Client) -> None:
    """Ask for what is missing; the server may send all of it anew."""
    url, credentials = split_credentials(transfer.url)
    have = _size(transfer.partial)
    try:
        with client.stream("GET", url, headers=_range(transfer, have), auth=credentials or _netrc()) as response:
            if response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE and have:
                # The partial file is as long as the whole or longer: its digest decides, and a wrong one starts anew.
                transfer.resumed = True
                return
            _check_status(transfer, response)
            resumed = response.status_code == httpx.codes.PARTIAL_CONTENT and _starts_at(response, have)
            if response.status_code == httpx.codes.PARTIAL_CONTENT and not resumed:
                transfer.discard()
                raise _TransientError("the server sent another range than it was asked for")
            if not resumed:
                transfer.discard()
                _remember(transfer, response)
                have = 0
            transfer.resumed, transfer.done = resumed, have
            length = response.headers.get("Content-Length", "")
            transfer.total = have + int(length) if length.isdigit() else transfer.total
            # As they come: gathered to larger chunks, the last ones before a break would be lost.
            _append(transfer, response.iter_raw())
    except (httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.TooManyRedirects) as error:
        raise FetchError(
            f"{transfer.download.what}: {shown(transfer.url)}: {shown(str(error))}", remedy="mend the URL"
        ) from error
    except httpx.TransportError as error:
        raise _TransientError(str(error) or type(error).__name__) from error


def _range(transfer: _Transfer, have: int) -> dict[str, str]:
    if not have:
        return {}
    validator = transfer.validator.read_text() if transfer.validator.exists() else ""
    return {"Range": f"bytes={have}-"} | ({"If-Range": validator} if validator else {})


def _starts_at(response: httpx.Response, offset: int) -> bool:
    return bool(response.headers.get("Content-Range", "").startswith(f"bytes {offset}-"))


def _remember(transfer: _Transfer, response: httpx.Response) -> None:
    """Keep what If-Range may name: a strong ETag, else the date."""
    etag = response.headers.get("ETag", "")
    validator = etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified", "")
    if validator:
        transfer.validator.write_text(validator)


def _check_status(transfer: _Transfer, response: httpx.Response) -> None:
    status = response.status_code
    if status in (httpx.codes.NOT_FOUND, httpx.codes.GONE):
        raise _absent(transfer, f"the server says {status}")
    if status in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        raise FetchError(
            f"{transfer.download.what}: {shown(transfer.url)}: the server says {status}",
            remedy="give credentials for that host in ~/.netrc, or name another mirror in GRACEFARM_MIRRORS",
        )
    if status in TRANSIENT:
        delay = response.headers.get("Retry-After", "")
        raise _TransientError(f"the server says {status}", float(delay) if delay.isdigit() else 0.0)
    if status not in (httpx.codes.OK, httpx.codes.PARTIAL_CONTENT):
        raise FetchError(f"{transfer.download.what}: {shown(transfer.url)}: the server says {status}", remedy=MIRROR_REMEDY)


def _absent(transfer: _Transfer, reason: str) -> FetchError:
    return FetchError(
        f"{transfer.download.what} is absent: {shown(transfer.url)}: {reason}",
        remedy="pin a file that exists, or name a mirror that has it: GRACEFARM_MIRRORS='PREFIX=REPLACEMENT'",
    )


def _append(transfer: _Transfer, chunks: Iterator[bytes]) -> None:
    with transfer.partial.open("ab") as stream:
        for chunk in chunks:
            stream.write(chunk)
            transfer.done += len(chunk)
            transfer.check()
        stream.flush()


def _verify(transfer: _Transfer, client: httpx.Client) -> None:
    """Compare digests; a wrong one after going on from an earlier run's bytes is given one fresh start."""
    expected = transfer.download.sha256
    got = sha256_file(transfer.partial)
    if got != expected and transfer.resumed:
        transfer.discard()
        _receive(transfer, client)
        got = sha256_file(transfer.partial)
    if got == expected:
        return
    size = _size(transfer.partial)
    transfer.discard()
    raise DigestError(
        f"{transfer.download.what}: {shown(transfer.url)} has sha256 {got} ({size} bytes), pinned is {expected}",
        remedy="the file was not kept; find out why it differs before you pin another digest",
    )


def _publish(transfer: _Transfer) -> None:
    with transfer.partial.open("rb") as stream:
        os.fsync(stream.fileno())
    transfer.partial.chmod(0o444)
    transfer.partial.rename(transfer.path)
    transfer.validator.unlink(missing_ok=True)
    sync_directory(transfer.path.parent)
    transfer.done = transfer.total = transfer.path.stat().st_size


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _netrc() -> httpx.Auth | None:
    """Credentials as curl, git and pip find them; None where there is no such file."""
    path = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    return httpx.NetRCAuth(str(path)) if path.is_file() else None


def pause(attempt: int) -> None:
    """Wait before the attempt of that number (from 0, which does not wait)."""
    if attempt:
        time.sleep(min(FIRST_DELAY * 2 ** (attempt - 1), LONGEST_DELAY))
