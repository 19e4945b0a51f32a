"""HTTP for the store: fetch the missing part of a file, with a range request if the server supports ranges.

A separate module, because httpx takes longer to import than `builder build` takes to find that a build exists.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import httpx

from builder.fetch.transfer import TRANSIENT, Transfer, TransientError, absent, append, size_of
from builder.fetch.urls import shown, split_credentials
from gracefarm.errors import FetchError

TIMEOUT = httpx.Timeout(30.0, connect=15.0)


@contextmanager
def requests() -> Iterator[Callable[[Transfer], None]]:
    """A function for any number of threads that makes one attempt at a transfer."""
    # identity: the server must send the pinned bytes of a .tar.gz, without compression.
    headers = {"Accept-Encoding": "identity", "User-Agent": "gracefarm"}
    with httpx.Client(timeout=TIMEOUT, follow_redirects=True, headers=headers) as client:
        yield partial(request, client)


def request(client: httpx.Client, transfer: Transfer) -> None:
    """Request the missing part; the server may send the whole file."""
    url, credentials = split_credentials(transfer.url)
    have = size_of(transfer.partial)
    try:
        with client.stream("GET", url, headers=_range(transfer, have), auth=credentials or _netrc()) as response:
            if response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE and have:
                # The partial file is complete or too long: its digest decides, and a wrong one starts again.
                transfer.resumed = True
                return
            _check_status(transfer, response)
            resumed = response.status_code == httpx.codes.PARTIAL_CONTENT and _starts_at(response, have)
            if response.status_code == httpx.codes.PARTIAL_CONTENT and not resumed:
                transfer.discard()
                raise TransientError("the server sent a different range than requested")
            if not resumed:
                transfer.discard()
                _remember(transfer, response)
                have = 0
            transfer.resumed, transfer.done = resumed, have
            length = response.headers.get("Content-Length", "")
            transfer.total = have + int(length) if length.isdigit() else transfer.total
            # Write chunks as they arrive: larger chunks would lose the last bytes before an interruption.
            append(transfer, response.iter_raw())
    except (httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.TooManyRedirects) as error:
        raise FetchError(
            f"{transfer.download.what}: {shown(transfer.url)}: {shown(str(error))}",
            remedy="correct the URL in the recipe, the stack or GRACEFARM_MIRRORS",
        ) from error
    except httpx.TransportError as error:
        raise TransientError(str(error) or type(error).__name__) from error


def _range(transfer: Transfer, have: int) -> dict[str, str]:
    if not have:
        return {}
    validator = transfer.validator.read_text() if transfer.validator.exists() else ""
    return {"Range": f"bytes={have}-"} | ({"If-Range": validator} if validator else {})


def _starts_at(response: httpx.Response, offset: int) -> bool:
    return bool(response.headers.get("Content-Range", "").startswith(f"bytes {offset}-"))


def _remember(transfer: Transfer, response: httpx.Response) -> None:
    """Keep a validator for If-Range: a strong ETag, else the date."""
    etag = response.headers.get("ETag", "")
    validator = etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified", "")
    if validator:
        transfer.validator.write_text(validator)


def _check_status(transfer: Transfer, response: httpx.Response) -> None:
    status = response.status_code
    cause = f"{transfer.download.what}: {shown(transfer.url)}: HTTP status {status}"
    if status in (httpx.codes.NOT_FOUND, httpx.codes.GONE):
        raise absent(transfer, f"HTTP status {status}")
    if status in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        remedy = "add credentials for that host to ~/.netrc, or set a mirror: GRACEFARM_MIRRORS='PREFIX=REPLACEMENT'"
        raise FetchError(cause, remedy=remedy)
    if status in TRANSIENT:
        delay = response.headers.get("Retry-After", "")
        raise TransientError(f"HTTP status {status}", float(delay) if delay.isdigit() else 0.0)
    if status not in (httpx.codes.OK, httpx.codes.PARTIAL_CONTENT):
        remedy = "check the URL, or set a mirror that has the file: GRACEFARM_MIRRORS='PREFIX=REPLACEMENT'"
        raise FetchError(f"{cause}: the server did not send the file", remedy=remedy)


def _netrc() -> httpx.Auth | None:
    """Credentials from ~/.netrc, as for curl, git and pip; None if there is no such file."""
    path = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    return httpx.NetRCAuth(str(path)) if path.is_file() else None
