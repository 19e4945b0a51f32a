"""The page of published sets and of views."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from index.errors import NotFoundError
from index.sets import staged
from index.simple_api import requirements, views
from index.store.catalogue import Catalogue
from index.web.site import Site


def sets(site: Site, request: Request) -> Response:
    """Render the page of published sets and views."""
    with site.catalogue.moment():
        published = [item for item in staged.all_sets(site.catalogue) if item.state == "published"]
        shown = [view for view in views.public(site.catalogue) if view.kind != "set"]
        lockless = {item.name: _lockless(site.catalogue, item.name) for item in published}
        defects = {item.name: _defects(site.catalogue, item.name) for item in published}
    return site.render(request, "sets.html", sets=published, views=shown, lockless=lockless, defects=defects)


def _defects(catalogue: Catalogue, name: str) -> dict[str, str]:
    """The defects of the set's files, by file name. Mirrored files have no other page."""
    rows = catalogue.rows(
        "SELECT filename, defects FROM live_file JOIN member ON file_id = id WHERE set_name = :name AND defects <> ''"
        " UNION SELECT filename, defects FROM live_mirrored WHERE set_name = :name AND defects <> ''",
        {"name": name},
    )
    return {row["filename"]: "; ".join(row["defects"].splitlines()) for row in rows}


def _lockless(catalogue: Catalogue, name: str) -> str:
    """Why the set has no lock; "" if it has one."""
    try:
        requirements.render(catalogue, views.View(kind="set", prefix=(name,), argument=name))
    except NotFoundError as error:
        return error.cause
    return ""
