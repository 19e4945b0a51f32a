"""The first page, with every project, and each project's own, with its wheel finder."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass

from packaging.version import Version
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from index.errors import NotFoundError
from index.names import name_in_address, view_of_cuda
from index.simple_api import listings
from index.simple_api.listings import ALL, NIGHTLY, Listed
from index.simple_api.simple import file_path
from index.store.catalogue import Catalogue
from index.web.finder import FINDER, choice_of, natural_order, options
from index.web.site import Site


@dataclass(frozen=True, kw_only=True)
class ProjectRow:
    """One project on the first page."""

    name: str
    version: str
    summary: str
    cudas: tuple[str, ...]
    status: str
    updated: str


class ProjectPages:
    """The pages of projects. Rows of the first one are kept until their project changes."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self._cached_rows: dict[str, ProjectRow] = {}
        self._serial = -1

    def first(self, request: Request) -> Response:
        """The first page."""
        wanted = request.query_params.get("q", "").strip()[:100]
        known = self._all_rows()
        rows = [row for row in known if wanted.lower() in row.name]
        return self.site.render(request, "projects.html", rows=rows, wanted=wanted, total=len(known))

    def _all_rows(self) -> list[ProjectRow]:
        """Every project's row; only those that have changed are read again. Only the page thread calls it."""
        catalogue = self.site.catalogue
        serial = catalogue.serial()
        if serial != self._serial:
            changed = [row["name"] for row in catalogue.rows("SELECT name FROM project WHERE serial > ?", (self._serial,))]
            rows = self._rows() if len(changed) > 20 else [row for name in changed for row in self._rows(name)]
            for name in changed:
                self._cached_rows.pop(name, None)
            self._cached_rows.update((row.name, row) for row in rows)
            self._serial = serial
        return sorted(self._cached_rows.values(), key=lambda row: row.name)

    def _rows(self, project: str | None = None) -> list[ProjectRow]:
        files: dict[str, list[sqlite3.Row]] = {}
        for file_row in self.site.catalogue.rows(
            "SELECT file.project, file.version, file.summary, file.cuda, file.uploaded, project.status"
            " FROM public_file AS file JOIN project ON project.name = file.project"
            " WHERE :project IS NULL OR file.project = :project ORDER BY file.project",
            {"project": project},
        ):
            files.setdefault(file_row["project"], []).append(file_row)
        return [_project_row(name, file_rows) for name, file_rows in files.items()]

    def project(self, request: Request) -> Response:
        """A project with its wheel finder."""
        name = name_in_address(request.path_params["name"])
        if request.path_params["name"] != name or not request.url.path.endswith("/"):
            back = "../" if request.url.path.endswith("/") else ""
            return RedirectResponse(f"{back}{name}/", status_code=301)
        catalogue = self.site.catalogue
        files = [*listings.files(catalogue, ALL, name), *listings.files(catalogue, NIGHTLY, name)]
        if not files:
            raise NotFoundError(f"there is no project {name!r} here", remedy="see / for those that are")
        choices = sorted(
            (choice_of(item) for item in files),
            key=lambda choice: (Version(choice.file.version), choice.file.filename),
            reverse=True,
        )
        asked = {key: request.query_params.get(key, "") for key in FINDER}
        shown = [choice for choice in choices if all(not value or value in choice.value(key) for key, value in asked.items())]
        best = next((choice for choice in shown if choice.file.yanked is None and choice.file.kind == "bdist_wheel"), None)
        state = listings.status(catalogue, name)
        return self.site.render(
            request,
            "project.html",
            name=name,
            state=state,
            filtered=any(asked.values()),
            summary=next((row.summary for row in self._rows(name)), ""),
            finder=[(key, options(choices, key), asked[key]) for key in FINDER],
            shown=[] if state.status == "quarantined" else shown,
            total=len(choices),
            best=best if state.status != "quarantined" else None,
            view=narrowest_view(catalogue, best.file) if best else "",
            file_path=file_path,
        )


def names(catalogue: Catalogue) -> list[str]:
    """Every project that has a page."""
    return [row["project"] for row in catalogue.rows("SELECT DISTINCT project FROM public_file ORDER BY project")]


def narrowest_view(catalogue: Catalogue, file: Listed) -> str:
    """Path of the narrowest view that shows the wheel."""
    row = catalogue.row("SELECT channel FROM file WHERE filename = ?", (file.filename,))
    if row and row["channel"] == "nightly":
        return "nightly/"
    return f"{view_of_cuda(file.facts.cuda)}/" if file.facts.cuda else ""


def _project_row(name: str, items: Sequence[sqlite3.Row]) -> ProjectRow:
    newest = max(items, key=lambda item: Version(item["version"]))
    return ProjectRow(
        name=name,
        version=Version(newest["version"]).public,
        summary=newest["summary"],
        cudas=tuple(sorted({item["cuda"] for item in items if item["cuda"]}, key=natural_order)),
        status=newest["status"],
        updated=max(item["uploaded"] for item in items),
    )
