"""Views: the files that each simple API shows. One store has many lists and no copies.

all      every release file of this index                 /simple/
cuda     files for one CUDA version and any torch         /cu130/simple/
         and files built for one torch                    /cu130-torch2.11/simple/
nightly  files of the nightly channel                     /nightly/simple/
set      files of one published set, with mirrored ones   /NAME/simple/
         files of a staged set, at a secret address       /preview/TOKEN/simple/
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from packaging.version import Version

from gracefarm.variants import split_label
from index.names import stack_of_view, view_of_cuda
from index.store import facts, variants
from index.store.catalogue import Catalogue
from index.store.facts import CudaFacts

ViewKind = Literal["all", "cuda", "nightly", "set"]


@dataclass(frozen=True, kw_only=True)
class View:
    """A list of files and its address."""

    kind: ViewKind
    prefix: tuple[str, ...] = ()
    "Path segments before `simple/`."
    argument: str = ""
    "The CUDA version, or the set's name."
    torch: str = ""
    "For example 2.11, in a view for one torch."

    @property
    def address(self) -> str:
        """Path of the view's list of projects."""
        return "/" + "/".join([*self.prefix, "simple", ""])

    def shows(self, version: str, known: CudaFacts) -> bool:
        """Whether the view contains a file of its CUDA (or without CUDA), considering only torch."""
        if self.kind != "cuda":
            return True
        if known.cuda is None:  # the builder's wheel without device code; a wheel with only a pin is built for CPUs
            return facts.torch_of_local(version) == self.torch
        return facts.built_for(version, known) in (None, self.torch)


@dataclass(frozen=True, kw_only=True)
class Listed:
    """A file as a page shows it."""

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
    "None: not yanked. Empty: yanked without a reason."
    facts: CudaFacts
    build: str | None
    url: str | None
    "Absolute address of a linked file."
    provenance_sha256: str | None = None
    "Digest of its verified attestations (PEP 740)."
    defects: tuple[str, ...] = ()
    "Defects of a file published elsewhere that may cause installers to fail."
    variant: str = ""
    "The label of a variant wheel."


@dataclass(frozen=True, kw_only=True)
class ProjectStatus:
    """Status of a project (PEP 792)."""

    status: str = "active"
    reason: str = ""


ALL = View(kind="all")
NIGHTLY = View(kind="nightly", prefix=("nightly",))

_SHOWN = """lost = 0 AND CASE :kind
    WHEN 'all' THEN hidden = 0 AND channel = 'release'
    WHEN 'cuda' THEN hidden = 0 AND channel = 'release' AND (cuda = :argument OR (cuda IS NULL AND :torch <> ''))
    WHEN 'nightly' THEN hidden = 0 AND channel = 'nightly'
    WHEN 'set' THEN id IN (SELECT file_id FROM member WHERE set_name = :argument)
END"""

_SHOWN_PROJECTS = f"""
SELECT DISTINCT project, CASE :kind WHEN 'cuda' THEN version ELSE '' END AS version,
    CASE :kind WHEN 'cuda' THEN facts ELSE '{{}}' END AS facts FROM live_file WHERE {_SHOWN}
UNION SELECT project, '', '{{}}' FROM live_mirrored WHERE :kind = 'set' AND set_name = :argument AND lost = 0
"""  # noqa: S608 - constants

_SHOWN_FILES = f"SELECT * FROM live_file WHERE project = :project AND {_SHOWN} ORDER BY uploaded, filename"  # noqa: S608 - constants


def find(catalogue: Catalogue, prefix: Sequence[str]) -> View | None:
    """The view at these path segments; None if it does not exist. A staged set has no view at its name."""
    match list(prefix):
        case []:
            return ALL
        case ["nightly"]:
            return NIGHTLY
        case ["preview", token]:
            row = catalogue.row("SELECT name FROM release_set WHERE preview = ? AND state = 'staged'", (token,))
            return View(kind="set", prefix=("preview", token), argument=row["name"]) if row else None
        case [name]:
            if stack := stack_of_view(name):
                return _stack(name, *stack) if stack in _stacks(catalogue, stack[0]) else None
            row = catalogue.row("SELECT name FROM release_set WHERE name = ? AND state = 'published'", (name,))
            return View(kind="set", prefix=(name,), argument=name) if row else None
    return None


def public(catalogue: Catalogue) -> list[View]:
    """Every public view: all, per CUDA, per CUDA and torch, nightly, published sets."""
    sets = catalogue.rows("SELECT name FROM release_set WHERE state = 'published' ORDER BY name")
    stacks = sorted(set(_stacks(catalogue)), key=lambda pair: [Version(part or "0") for part in pair])
    return [
        ALL,
        *(_stack(name, *pair) for pair in stacks if stack_of_view(name := view_of_cuda(*pair)) == pair),
        NIGHTLY,
        *(View(kind="set", prefix=(row["name"],), argument=row["name"]) for row in sets),
    ]


def _stack(name: str, cuda: str, torch: str) -> View:
    return View(kind="cuda", prefix=(name,), argument=cuda, torch=torch)


def _stacks(catalogue: Catalogue, cuda: str | None = None) -> Iterator[tuple[str, str]]:
    """CUDA and torch of each file, and CUDA without torch, with repetitions; with `cuda`, only files of that CUDA."""
    rows = catalogue.database.execute(
        "SELECT DISTINCT cuda, facts, substr(version, instr(version || '+', '+')) AS local FROM live_file"
        " WHERE hidden = 0 AND lost = 0 AND channel = 'release' AND cuda = coalesce(?, cuda)",
        (cuda,),
    )
    for row in rows:
        yield row["cuda"], ""
        if torch := facts.built_for(row["local"], facts.from_json(row["facts"])):
            yield row["cuda"], torch


def other_views(catalogue: Catalogue, view: View, project: str) -> list[View]:
    """Other views of the same CUDA that show the project."""
    if view.kind != "cuda":
        return []
    same = [other for other in public(catalogue) if other.kind == "cuda" and other.argument == view.argument]
    return [other for other in same if files(catalogue, other, project)]


def projects(catalogue: Catalogue, view: View) -> list[str]:
    """Sorted names of the projects with files in the view."""
    rows = catalogue.rows(_SHOWN_PROJECTS, {"kind": view.kind, "argument": view.argument, "torch": view.torch})
    return sorted({row["project"] for row in rows if view.shows(row["version"], facts.from_json(row["facts"]))})


def status(catalogue: Catalogue, project: str) -> ProjectStatus:
    """Status of a project (PEP 792); active by default."""
    row = catalogue.row("SELECT status, reason FROM project WHERE name = ?", (project,))
    return ProjectStatus(status=row["status"], reason=row["reason"]) if row else ProjectStatus()


def files(catalogue: Catalogue, view: View, project: str) -> list[Listed]:
    """The project's files in the view, in upload order; empty for an unknown name."""
    wanted = {"kind": view.kind, "argument": view.argument, "torch": view.torch, "project": project}
    own = [listed(row) for row in catalogue.rows(_SHOWN_FILES, wanted)]
    shown = [item for item in own if view.shows(item.version, item.facts)]
    if view.kind == "set":
        known = {item.filename for item in shown}
        rows = catalogue.rows(
            "SELECT * FROM live_mirrored WHERE set_name = ? AND project = ? AND lost = 0 ORDER BY filename",
            (view.argument, project),
        )
        shown += [listed(row) for row in rows if row["filename"] not in known]
    return shown


def variants_json(catalogue: Catalogue, view: View, project: str, shown: Sequence[Listed]) -> list[Listed]:
    """The JSON of each release with variant wheels in `shown`, as an additional file of the page (PEP 825)."""
    releases = {item.version for item in shown if item.variant}
    if not releases:
        return []
    staged_set = view.argument if view.prefix[:1] == ("preview",) else None
    documents = variants.documents(catalogue.database, project, staged_set)
    return [
        Listed(
            filename=document.filename,
            project=project,
            version=document.version,
            kind="variants",
            sha256=document.sha256,
            size=len(document.content),
            metadata_sha256=None,
            requires_python=None,
            uploaded=document.uploaded,
            yanked=document.yanked,
            facts=CudaFacts(),
            build=None,
            url=None,
        )
        for document in documents
        if document.version in releases
    ]


def listed(row: sqlite3.Row) -> Listed:
    """A row of the table `file`, or of `mirrored`."""
    values: dict[str, Any] = {
        "yanked": None,
        "facts": "{}",
        "build": None,
        "url": None,
        "provenance_sha256": None,
        **dict(row),
    }
    if not values.get("serves_metadata", True):
        values["metadata_sha256"] = None
    values["facts"] = facts.from_json(values["facts"])
    values["variant"] = split_label(values["filename"])[1] if values.get("variant") else ""
    values["defects"] = tuple(values["defects"].splitlines())
    return Listed(**{column.name: values[column.name] for column in fields(Listed)})
