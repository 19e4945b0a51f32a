"""Fetch a file whose digest is unknown: only for `builder lock` and first use, never for a build."""

from __future__ import annotations

import threading
from uuid import uuid4

from builder.fetch import store, web
from builder.fetch.transfer import Download, Transfer, mirror_remedy
from builder.planning.settings import Settings
from gracefarm.errors import FetchError
from gracefarm.files import full_disk, sha256_file


def bring(url: str, what: str, settings: Settings) -> str:
    """The sha256 of the file at `url`. The file is kept in the store, so that a build does not fetch it again.

    Raises:
        FetchError: the file cannot be fetched; names the URL and the setting for a mirror.
    """
    transfer = Transfer(
        download=Download(url=url, sha256="", what=what),
        url=settings.redirect(url),
        path=settings.home / "store" / f"unpinned-{uuid4().hex}",
        cancelled=threading.Event(),
    )
    transfer.path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with full_disk(settings.home), web.requests() as request:
            store.receive(transfer, request)
            sha256 = sha256_file(transfer.partial)
            store.publish(transfer, store.store_path(settings, sha256))
    except FetchError as error:
        raise FetchError(error.cause, remedy=mirror_remedy(url)) from error
    finally:
        transfer.discard()
    return sha256
