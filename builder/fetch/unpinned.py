"""A file whose digest nobody knows yet: for `builder lock` alone, never for a build."""

from __future__ import annotations

import threading
from uuid import uuid4

from builder.fetch import store, web
from builder.fetch.transfer import Download, Transfer, mirror_remedy
from builder.planning.settings import Settings
from gracefarm.errors import FetchError
from gracefarm.files import full_disk, sha256_file


def bring(url: str, what: str, settings: Settings) -> str:
    """The sha256 of what is at `url` now; the file itself goes into the store, so that a build need not fetch it again.

    Raises:
        FetchError: it cannot be had; names the address and the setting of a mirror.
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
