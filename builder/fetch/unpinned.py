"""A file whose digest nobody knows yet: for `builder lock` alone, never for a build."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import httpx

from builder.fetch.store import store_path
from builder.fetch.transfer import mirror_remedy
from builder.fetch.urls import shown, split_credentials
from builder.planning.settings import Settings
from gracefarm.errors import FetchError
from gracefarm.files import CHUNK, full_disk, sha256_file

TIMEOUT = httpx.Timeout(60.0, connect=15.0)


def bring(url: str, what: str, settings: Settings) -> str:
    """The sha256 of what is at `url` now; the file itself goes into the store, so that a build need not fetch it again.

    Raises:
        FetchError: it cannot be had; names the address and the setting of a mirror.
    """
    place, credentials = split_credentials(settings.redirect(url))
    partial = settings.home / "store" / f"unpinned-{uuid4().hex}"
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        with full_disk(settings.home), partial.open("wb") as stream:
            for chunk in _read(place, credentials):
                stream.write(chunk)
            stream.flush()
            os.fsync(stream.fileno())
        sha256 = sha256_file(partial)
        final = store_path(settings, sha256)
        final.parent.mkdir(parents=True, exist_ok=True)
        partial.chmod(0o444)
        partial.rename(final)
    except (httpx.HTTPError, OSError) as error:
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise
        raise FetchError(f"{what}: {shown(place)} cannot be had: {shown(str(error))}", remedy=mirror_remedy(url)) from error
    finally:
        partial.unlink(missing_ok=True)
    return sha256


def _read(url: str, credentials: tuple[str, str] | None) -> Iterator[bytes]:
    if url.startswith("file://"):
        with Path(httpx.URL(url).path).open("rb") as stream:
            yield from iter(lambda: stream.read(CHUNK), b"")
        return
    with (
        httpx.Client(timeout=TIMEOUT, follow_redirects=True, headers={"Accept-Encoding": "identity"}) as client,
        client.stream("GET", url, auth=credentials) as response,
    ):
        response.raise_for_status()
        yield from response.iter_bytes()
