"""The first page, with all projects and a search, and the page of each project, with its releases and the wheel finder."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass

from packaging.version import Version
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from index.errors import NotFoundError
from index.names import name_in_address, view_of_cuda
from index.simple_api import views
from index.simple_api.simple import file_path
from index.simple_api.views import ALL, NIGHTLY, Listed, View
from index.store.catalogue import Catalogue
from index.store.facts import built_for
from index.web import about
from index.web.about import About
from index.web.finder import FINDER, WheelChoice, asked_python, choice_of, natural_order, options
from index.web.site import Site

_SEPARATORS = re.compile(r"[-_.\s]+")

ABOUTS = 200
"Maximum rendered descriptions in the cache."


@dataclass(frozen=True, kw_only=True)
class ProjectRow:
    """A project on the first page."""

    name: str
    version: str
    summary: str
    cudas: tuple[str, ...]
    status: str
    updated: str


@dataclass(frozen=True, kw_only=True)
class ReleaseRow:
    """The files of one public version. Builds for several CUDA and torch versions differ only in the local part."""

    version: str
    choices: tuple[WheelChoice, ...]
    uploaded: str
    "Upload time of its first file."
    yanked: bool
    "Whether all files are yanked."
    open: bool


class ProjectPages:
    """The pages of projects. Rows of the first page and descriptions are cached until their project changes."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self._cached_rows: dict[str, ProjectRow] = {}
        self._serial = -1
        self._abouts: dict[str, About] = {}

    def first(self, request: Request) -> Response:
        """The first page."""
        wanted = request.query_params.get("q", "").strip()[:100]
        known = self._all_rows()
        return self.site.render(request, "projects.html", rows=search(known, wanted), wanted=wanted, total=len(known))

    def _all_rows(self) -> list[ProjectRow]:
        """The rows of all projects; only changed ones are read again. Only the page thread calls this."""
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
        """The page of a project: install commands, files by release, dependencies, description."""
        name = name_in_address(request.path_params["name"])
        if request.path_params["name"] != name or not request.url.path.endswith("/"):
            back = "../" if request.url.path.endswith("/") else ""
            return RedirectResponse(f"{back}{name}/", status_code=301)
        choices = choices_of(self.site.catalogue, name)
        asked = {key: request.query_params.get(key, "") for key in FINDER}
        asked["python"] = asked_python(asked["python"])
        shown = [choice for choice in choices if all(choice.fits(key, value) for key, value in asked.items())]
        best = best_of(shown)
        state = views.status(self.site.catalogue, name)
        offered = state.status != "quarantined"
        return self.site.render(
            request,
            "project.html",
            name=name,
            state=state,
            offered=offered,
            filtered=any(asked.values()),
            about=self._about(choices),
            finder=[(key, options(choices, key), asked[key]) for key in FINDER],
            releases=releases(shown, best, any(asked.values())) if offered else [],
            shown=len(shown) if offered else 0,
            total=len(choices),
            latest=best_of(choices) or choices[0],
            recommended=any(choice.recommended for choice in choices),
            variant_views=variant_views(self.site.catalogue, name),
            best=best if offered else None,
            view=narrowest_view(self.site.catalogue, best.file) if best else "",
            file_path=file_path,
        )

    def _about(self, choices: Sequence[WheelChoice]) -> About:
        """Metadata of the newest wheel, rendered once. Metadata of sdists is not stored."""
        candidates = [choice for choice in (best_of(choices), *choices) if choice is not None]
        digest = next((choice.file.metadata_sha256 for choice in candidates if choice.file.metadata_sha256), "")
        if digest not in self._abouts:
            if len(self._abouts) >= ABOUTS:
                self._abouts.clear()
            self._abouts[digest] = about.read(self.site.store, digest or None)
        return self._abouts[digest]


def search(rows: Sequence[ProjectRow], wanted: str) -> list[ProjectRow]:
    """Projects with this name in any spelling, or with all words in name and summary; best match first."""
    words = [word for word in _SEPARATORS.split(wanted.lower()) if word]
    name = "-".join(words)

    def rank(row: ProjectRow) -> int | None:
        if name in row.name:
            return 0 if row.name == name else 1 if row.name.startswith(name) else 2
        text = f"{row.name} {row.summary}".lower()
        return 3 if all(word in text for word in words) else None

    ranked = [(place, row.name, row) for row in rows if (place := rank(row)) is not None]
    return [row for _, _, row in sorted(ranked, key=lambda item: item[:2])]


def choices_of(catalogue: Catalogue, name: str) -> list[WheelChoice]:
    """The project's files, newest version first; within a version, newest CUDA, torch and Python first.

    Raises:
        NotFoundError: the project has no files.
    """
    files = [*views.files(catalogue, ALL, name), *views.files(catalogue, NIGHTLY, name)]
    if not files:
        raise NotFoundError(
            f"this index has no project {name!r}", remedy="open the page / of this index, which lists all projects"
        )
    return sorted((choice_of(item) for item in files), key=_newest_first, reverse=True)


def _newest_first(choice: WheelChoice) -> tuple[object, ...]:
    facts = choice.file.facts
    public = Version(Version(choice.file.version).public)
    order = [natural_order(text or "") for text in (facts.cuda, facts.torch, choice.python, choice.file.filename)]
    return (public, choice.file.kind == "bdist_wheel", *order)


def best_of(choices: Sequence[WheelChoice]) -> WheelChoice | None:
    """The newest recommended wheel; like installers, use a pre-release only if there is no other."""
    wheels = [choice for choice in choices if choice.recommended]
    final = (choice for choice in wheels if not Version(choice.file.version).is_prerelease)
    return next(final, wheels[0] if wheels else None)


def releases(choices: Sequence[WheelChoice], best: WheelChoice | None, all_open: bool) -> list[ReleaseRow]:
    """The files by public version, in their order. The release of the `best` wheel is open, others are folded."""
    groups: dict[str, list[WheelChoice]] = {}
    for choice in choices:
        groups.setdefault(Version(choice.file.version).public, []).append(choice)
    opened = Version(best.file.version).public if best else next(iter(groups), "")
    return [
        ReleaseRow(
            version=version,
            choices=tuple(members),
            uploaded=min(choice.file.uploaded for choice in members),
            yanked=all(choice.file.yanked is not None for choice in members),
            open=all_open or version == opened,
        )
        for version, members in groups.items()
    ]


def names(catalogue: Catalogue) -> list[str]:
    """Every project with a page."""
    return [row["project"] for row in catalogue.rows("SELECT DISTINCT project FROM public_file ORDER BY project")]


def narrowest_view(catalogue: Catalogue, file: Listed) -> str:
    """Path of the most specific view that shows the wheel."""
    row = catalogue.row("SELECT channel FROM file WHERE filename = ?", (file.filename,))
    if row and row["channel"] == "nightly":
        return "nightly/"
    torch = built_for(file.version, file.facts) or ""
    return f"{view_of_cuda(file.facts.cuda, torch)}/" if file.facts.cuda else ""


def variant_views(catalogue: Catalogue, name: str) -> list[str]:
    """Paths of the views from which uv selects a variant; empty if the project has no variants.

    uv takes the highest local version, so a view must not contain variants for two torch versions. Variants that any torch
    can load need no such view.
    """
    stacks = {(item.facts.cuda, built_for(item.version, item.facts) or "") for item in _variants(catalogue, ALL, name)}
    shown = [view for view in views.public(catalogue) if view.kind == "cuda" and (view.argument, view.torch) in stacks]
    if not any(view.torch for view in shown):
        shown = [ALL] if stacks else []
    nightly = [NIGHTLY] if _variants(catalogue, NIGHTLY, name) else []
    return ["".join(f"{part}/" for part in view.prefix) for view in (*shown, *nightly)]


def _variants(catalogue: Catalogue, view: View, name: str) -> list[Listed]:
    return [item for item in views.files(catalogue, view, name) if item.variant and item.yanked is None]


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
