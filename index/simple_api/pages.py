"""Render a page of the simple API from the catalogue."""

from __future__ import annotations

from index.errors import NotFoundError
from index.simple_api import simple, views
from index.simple_api.negotiate import Format
from index.simple_api.views import View
from index.store.catalogue import Catalogue


def render(catalogue: Catalogue, view: View, project: str, form: Format, base_url: str | None = None) -> bytes:
    """Render one page from the catalogue; `base_url` is the address of the index, if it is known.

    Raises:
        NotFoundError: the view has no project of that name.
    """
    if not project:
        names = views.projects(catalogue, view)
        return simple.root_json(names) if form == "json" else simple.root_html(names)
    files = views.files(catalogue, view, project)
    if not files:
        others = ", ".join(other.address for other in views.other_views(catalogue, view, project))
        if others:
            torch = f"torch {view.torch}" if view.torch else "every torch"
            raise NotFoundError(
                f"the view {view.prefix[0]} has no files of {project} that fit {torch}",
                remedy=f"use one of these addresses: {others}",
            )
        raise NotFoundError(
            f"this index has no project {project!r}", remedy="see the address one level up, which lists the projects"
        )
    files += views.variants_json(catalogue, view, project, files)
    status = views.status(catalogue, project)
    make = simple.project_json if form == "json" else simple.project_html
    return make(view, project, files, status, base_url)
