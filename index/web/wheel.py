"""The page of one wheel, with data from its build's record."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from index.errors import NotFoundError
from index.simple_api import views
from index.simple_api.simple import file_path
from index.store import documents, records
from index.web.finder import choice_of
from index.web.projects import narrowest_view
from index.web.record import document_of
from index.web.site import Site


def wheel(site: Site, request: Request) -> Response:
    """Render the page of a file: properties, verdicts of the gates, origin."""
    catalogue = site.catalogue
    row = catalogue.row("SELECT * FROM public_file WHERE filename = ?", (request.path_params["filename"],))
    if row is None:
        raise NotFoundError("this index has no such wheel", remedy="see the project's page, which lists its wheels")
    item = views.listed(row)
    build_row = catalogue.row("SELECT * FROM record WHERE id = ?", (item.build,))
    record = records.summary(build_row) if build_row is not None else None
    sets = catalogue.rows(
        "SELECT set_name FROM member JOIN release_set ON name = set_name WHERE file_id = ? AND state = 'published'",
        (row["id"],),
    )
    choice, state = choice_of(item), views.status(catalogue, item.project)
    installable = item.kind == "bdist_wheel" and not choice.variant and item.yanked is None and state.status != "quarantined"
    document = document_of(site.store, record)
    return site.render(
        request,
        "wheel.html",
        file=item,
        record=record,
        document=document,
        choice=choice,
        installable=installable,
        certificates=documents.certificates(site.store, catalogue, item.sha256, document.device_digests),
        sets=[set_row["set_name"] for set_row in sets],
        path=file_path(item),
        view=narrowest_view(catalogue, item),
        state=state,
    )
