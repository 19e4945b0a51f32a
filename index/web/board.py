"""The board: the cells of each matrix, and the last builds of recipes outside of every matrix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response

from index.store import documents, records
from index.store.records import Summary
from index.web.finder import natural_order
from index.web.site import Site

if TYPE_CHECKING:
    from index.store.schemas import CellState, MatrixCell, MatrixDocument

MAX_SHOWN = 5000
"Maximum cells of a matrix to draw. For a larger one, the board shows counts and failed or blocked cells."

MAX_TEXT = 2000
"Maximum characters of a selector or reason to show."

STATES: tuple[CellState, ...] = ("built", "served", "running", "failed", "blocked", "not tried")


@dataclass(frozen=True, kw_only=True)
class BoardCell:
    """A cell as the board shows it."""

    cell: MatrixCell
    state: CellState
    reason: str
    href: str
    "Page of the build, else of the wheel, relative to /board/; empty if the index has neither."

    @property
    def column(self) -> str:
        """Column of the board: stack and target."""
        return f"{self.cell.stack} {self.cell.target}"

    @property
    def python(self) -> str:
        """Name of the Python, as `builder matrix` prints it."""
        return self.cell.interpreter or self.cell.python

    @property
    def sm(self) -> str:
        """The sm list as text, for example 90a, 100f."""
        return ", ".join(self.cell.sm)


@dataclass(kw_only=True)
class BoardRow:
    """The cells of one version of a recipe."""

    recipe: str
    version: str
    places: dict[str, dict[str, list[BoardCell]]] = field(default_factory=dict)
    "Column, then sm list, then cells ordered by Python."

    @property
    def sm(self) -> str:
        """The sm list, if all cells have the same one; else empty."""
        lists = {sm for groups in self.places.values() for sm in groups}
        return lists.pop() if len(lists) == 1 else ""


@dataclass(kw_only=True)
class Problem:
    """Cells with the same error or the same cause of blocking."""

    reason: str
    cells: list[BoardCell] = field(default_factory=list)

    @property
    def places(self) -> dict[str, dict[str, list[BoardCell]]]:
        """Recipe and version, then column."""
        places: dict[str, dict[str, list[BoardCell]]] = {}
        for shown in self.cells:
            name = f"{shown.cell.recipe} {shown.cell.version}".rstrip()
            places.setdefault(name, {}).setdefault(shown.column, []).append(shown)
        return places


@dataclass(frozen=True, kw_only=True)
class MatrixBoard:
    """A matrix as the board shows it."""

    name: str
    selector: str
    made: str
    counts: Mapping[str, int]
    "Cells per state, in the order of `STATES`; states without cells are omitted."
    columns: tuple[str, ...]
    rows: tuple[BoardRow, ...]
    "Empty if there are too many cells."
    failed: tuple[Problem, ...]
    blocked: tuple[Problem, ...]
    cpu_seconds: float
    "Expected need of the cells that are not built, from the values in the matrix."
    disk_bytes: int


def board(site: Site, request: Request) -> Response:
    """Every matrix, and the last result of each recipe and stack outside of every matrix."""
    known = records.all_records(site.catalogue)
    by_id = {record.id: record for record in known}
    wheels = {row["filename"] for row in site.catalogue.rows("SELECT filename FROM public_file")}
    sent = documents.matrices(site.store, site.catalogue)
    matrices = [matrix_board(document, by_id, wheels) for document in sent]
    inside = {cell.build_id for document in sent for cell in document.cells if cell.build_id}
    newest: dict[tuple[str, str], Summary] = {}
    for record in known:
        if record.outcome and record.id not in inside:
            newest.setdefault((record.recipe or "?", _column(record)), record)
    return site.render(
        request,
        "board.html",
        matrices=matrices,
        recipes=sorted({recipe for recipe, _ in newest}),
        columns=sorted({stack for _, stack in newest}),
        newest=newest,
        failed=sum(record.outcome == "failed" for record in newest.values()),
    )


def matrix_board(document: MatrixDocument, known: Mapping[str, Summary], wheels: set[str]) -> MatrixBoard:
    """A matrix, updated from the records and files of this index."""
    cells = [_shown(cell, document, known, wheels) for cell in document.cells]
    cells.sort(key=_order)
    counts = Counter(shown.state for shown in cells)
    waiting = [shown.cell for shown in cells if shown.state not in ("built", "served")]
    return MatrixBoard(
        name=document.name,
        selector=document.selector[:MAX_TEXT],
        made=document.made.isoformat(),
        counts={state: counts[state] for state in STATES if counts[state]},
        columns=tuple(sorted({shown.column for shown in cells}, key=natural_order)),
        rows=tuple(_rows(cells)) if len(cells) <= MAX_SHOWN else (),
        failed=tuple(_problems((shown for shown in cells if shown.state == "failed"), by_recipe=True)),
        blocked=tuple(_problems((shown for shown in cells if shown.state == "blocked"), by_recipe=False)),
        cpu_seconds=sum(cell.cpu_seconds or 0 for cell in waiting),
        disk_bytes=sum(cell.disk_bytes or 0 for cell in waiting),
    )


def _shown(cell: MatrixCell, document: MatrixDocument, known: Mapping[str, Summary], wheels: set[str]) -> BoardCell:
    """Whether the record overrides the cell: it is newer than the matrix, or the cell was not built for the matrix."""
    record = known.get(cell.build_id or "")
    state, reason = cell.state, cell.reason
    # A served cell names the build of another one.
    if record is not None and record.outcome in ("built", "failed") and state != "served":
        newer = _moment(record.finished)
        if state in ("not tried", "blocked") or (newer is not None and newer > document.made):
            state, reason = "built" if record.outcome == "built" else "failed", record.cause
        reason = reason or (record.cause if state == "failed" else "")
    href = f"{record.id}/" if record is not None else f"../wheel/{cell.wheel}/" if cell.wheel in wheels else ""
    return BoardCell(cell=cell, state=state, reason=reason[:MAX_TEXT], href=href.replace("+", "%2B"))


def _moment(text: str) -> datetime | None:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return moment if moment.tzinfo is not None else None


def _order(shown: BoardCell) -> tuple[object, ...]:
    cell = shown.cell
    return (
        cell.recipe.lower(),
        natural_order(cell.version),
        natural_order(shown.column),
        natural_order(shown.sm),
        natural_order(cell.python),
        natural_order(shown.python),
    )


def _rows(cells: Iterable[BoardCell]) -> list[BoardRow]:
    rows: dict[tuple[str, str], BoardRow] = {}
    for shown in cells:
        key = (shown.cell.recipe, shown.cell.version)
        row = rows.setdefault(key, BoardRow(recipe=key[0], version=key[1]))
        row.places.setdefault(shown.column, {}).setdefault(shown.sm, []).append(shown)
    return list(rows.values())


def _problems(cells: Iterable[BoardCell], *, by_recipe: bool) -> list[Problem]:
    """Group cells by reason, most frequent first; failed cells also by recipe."""
    problems: dict[tuple[str, str], Problem] = {}
    for shown in cells:
        key = (shown.cell.recipe if by_recipe else "", shown.reason)
        problems.setdefault(key, Problem(reason=shown.reason)).cells.append(shown)
    return sorted(problems.values(), key=lambda problem: -len(problem.cells))


def _column(record: Summary) -> str:
    """Column of a build in the table: its stack and target."""
    return " ".join(part for part in (record.stack, record.target) if part) or "?"
