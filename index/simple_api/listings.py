"""Views: which files a simple API shows. One store, many lists, no copies.

all      every release file of ours                       /simple/
cuda     those of one CUDA version                        /cu130/simple/
nightly  the nightly channel alone                        /nightly/simple/
set      the files of one published set, mirrored ones too, and no other name   /NAME/simple/
         a staged set's too, by an unguessable address          /preview/TOKEN/simple/
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from index.names import cuda_of_view, view_of_cuda
from index.store import facts
from index.store.catalogue import Catalogue
from index.store.facts import CudaFacts

ViewKind = Literal["all", "cuda", "nightly", "set"]


@dataclass(frozen=True, kw_only=True)
class View:
    """One list of files and where it is served."""

    kind: ViewKind
    prefix: tuple[str, ...] = ()
    "Path segments before simple/."
    argument: str = ""
    "The CUDA version, or the set's name."


@dataclass(frozen=True, kw_only=True)
class Listed:
    """One file as a page shows it."""

    filename: str
    project: str
    version: str
    kind: str
    sha256: str
    size: int
    metadata_sha256: str | None
    requires_python: str | None
    uploaded: str
    yanked: str | None
    "None: no. Empty: without a reason."
    facts: CudaFacts
    build: str | None
    url: str | None
    "Absolute, when the bytes are elsewhere."


@dataclass(frozen=True, kw_only=True)
class ProjectStatus:
    """PEP 792."""

    status: str = "active"
    reason: str = ""


ALL = View(kind="all")
NIGHTLY = View(kind="nightly", prefix=("nightly",))

_SHOWN = """lost = 0 AND CASE :kind
    WHEN 'all' THEN hidden = 0 AND channel = 'release'
    WHEN 'cuda' THEN hidden = 0 AND channel = 'release' AND cuda = :argument
    WHEN 'nightly' THEN hidden = 0 AND channel = 'nightly'
    WHEN 'set' THEN id IN (SELECT file_id FROM member WHERE set_name = :argument)
END"""

_SHOWN_PROJECTS = f"""
SELECT DISTINCT project FROM live_file WHERE {_SHOWN}
UNION SELECT project FROM live_mirrored WHERE :kind = 'set' AND set_name = :argument AND lost = 0
ORDER BY project
"""  # noqa: S608 - constants

_SHOWN_FILES = f"SELECT * FROM live_file WHERE project = :project AND {_SHOWN} ORDER BY uploaded, filename"  # noqa: S608 - constants


def find(catalogue: Catalogue, prefix: Sequence[str]) -> View | None:
    """The view at these path segments; None when there is none, a staged set under its own name included."""
    match list(prefix):
        case []:
            return ALL
        case ["nightly"]:
            return NIGHTLY
        case ["preview", token]:
            row = catalogue.row("SELECT name FROM release_set WHERE preview = ? AND state = 'staged'", (token,))
            return View(kind="set", prefix=("preview", token), argument=row["name"]) if row else None
        case [name]:
            if cuda := cuda_of_view(name):
                return View(kind="cuda", prefix=(name,), argument=cuda)
            row = catalogue.row("SELECT name FROM release_set WHERE name = ? AND state = 'published'", (name,))
            return View(kind="set", prefix=(name,), argument=name) if row else None
    return None


def public(catalogue: Catalogue) -> list[View]:
    """Every view that needs no secret: all, per CUDA, nightly, published sets."""
    cudas = catalogue.rows(
        "SELECT DISTINCT cuda FROM live_file WHERE hidden = 0 AND channel = 'release' AND cuda IS NOT NULL ORDER BY cuda"
    )
    sets = catalogue.rows("SELECT name FROM release_set WHERE state = 'published' ORDER BY name")
    per_cuda = [
        View(kind="cuda", prefix=(name,), argument=row["cuda"])
        for row in cudas
        if cuda_of_view(name := view_of_cuda(row["cuda"])) == row["cuda"]
    ]
    return [ALL, *per_cuda, NIGHTLY, *(View(kind="set", prefix=(row["name"],), argument=row["name"]) for row in sets)]


def projects(catalogue: Catalogue, view: View) -> list[str]:
    """Names of the projects with something to show in the view, sorted."""
    return [row["project"] for row in catalogue.rows(_SHOWN_PROJECTS, {"kind": view.kind, "argument": view.argument})]


def status(catalogue: Catalogue, project: str) -> ProjectStatus:
    """PEP 792 status of a project; active when nothing else was said."""
    row = catalogue.row("SELECT status, reason FROM project WHERE name = ?", (project,))
    return ProjectStatus(status=row["status"], reason=row["reason"]) if row else ProjectStatus()


def files(catalogue: Catalogue, view: View, project: str) -> list[Listed]:
    """The project's files in the view, in upload order; none for a name that the view does not know."""
    wanted = {"kind": view.kind, "argument": view.argument, "project": project}
    shown = [listed(row) for row in catalogue.rows(_SHOWN_FILES, wanted)]
    if view.kind == "set":
        known = {item.filename for item in shown}
        rows = catalogue.rows(
            "SELECT * FROM live_mirrored WHERE set_name = ? AND project = ? AND lost = 0 ORDER BY filename",
            (view.argument, project),
        )
        shown += [listed(row) for row in rows if row["filename"] not in known]
    return shown


def listed(row: sqlite3.Row) -> Listed:
    """A row of the table `file`, or of `mirrored`."""
    values: dict[str, Any] = {"yanked": None, "facts": "{}", "build": None, "url": None, **dict(row)}
    values["facts"] = facts.from_json(values["facts"])
    return Listed(**{column.name: values[column.name] for column in fields(Listed)})
