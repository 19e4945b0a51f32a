"""The page of one build, with its record."""

from __future__ import annotations

import os

from starlette.requests import Request
from starlette.responses import Response

from index.errors import NotFoundError
from index.store import records
from index.store.files import Store
from index.store.records import Summary
from index.web.record import document_of
from index.web.site import Site

TAIL = 25
"Lines of a failed build's log to show on its page."


def build(site: Site, request: Request) -> Response:
    """The page of one build, successful or failed."""
    row = site.catalogue.row("SELECT * FROM public_record WHERE id = ?", (request.path_params["id"],))
    if row is None:
        raise NotFoundError(
            "this index has no such build", remedy="open the page /board/ of this index, which lists the builds"
        )
    record = records.summary(row)
    wheels = site.catalogue.rows("SELECT filename FROM live_file WHERE build = ? AND hidden = 0", (record.id,))
    return site.render(
        request,
        "build.html",
        record=record,
        document=document_of(site.store, record),
        wheels=[file_row["filename"] for file_row in wheels],
        tail=_tail(site.store, record),
    )


def _tail(store: Store, record: Summary) -> str:
    """The last lines of a failed build's log."""
    if record.outcome != "failed" or record.log is None:
        return ""
    try:
        with store.path(record.log).open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - (1 << 14)))
            lines = stream.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return "\n".join(lines[-TAIL:])
