"""The state of each cell of a matrix: see `CellOutcome`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Literal

from packaging.utils import parse_wheel_filename

from builder.flow import costs, history, to_fetch
from builder.flow.costs import Costs
from builder.planning import device_code
from builder.planning.matrix import ROOT, Cell
from builder.planning.plan import Plan
from builder.planning.recipe import Recipe
from builder.planning.settings import Settings
from builder.planning.stack import LoadedStack
from builder.proof import record
from builder.proof.record import Likeness, Record
from gracefarm.errors import ConfigError, ExitCode, HostError
from gracefarm.files import locked
from gracefarm.pythons import serves
from gracefarm.variants import split_label

CellOutcome = Literal["built", "served", "running", "failed", "blocked", "not tried"]
INTERRUPTED = "the build was interrupted; a new build continues it"


@dataclass(frozen=True, kw_only=True)
class CellReport:
    """A cell and its state on this machine."""

    cell: Cell
    recipe: Recipe
    stack: LoadedStack
    "The stack with the cell's interpreter and architectures."
    plan: Plan | None
    "None: the cell cannot be planned."
    state: CellOutcome
    reason: str = ""
    "The first error of a failed cell; the reason of a blocked one; the wheel that serves it; or the hosts that it needs."
    build: Record | None = None
    "The record of this cell, or of the cell that serves it."
    costs: Costs = field(default_factory=Costs)


def report(
    cell: Cell,
    recipe: Recipe,
    stack: LoadedStack,
    make: Callable[[Cell], Plan],
    settings: Settings,
    records: Sequence[Record],
) -> CellReport:
    """The state of a cell; `make` plans it, `records` are all records of this machine, newest first."""
    stack = replace(stack, asked_sm=cell.sm)
    plan, build, blocked = None, None, ""
    try:
        plan = make(cell)
        plan.require_digests()
        build = record.read(settings, plan.build_id)
    except (ConfigError, HostError) as error:
        plan, blocked = None, error.cause
    entry = CellReport(cell=cell, recipe=recipe, stack=stack, plan=plan, state="not tried")
    if build is not None and build.outcome == "built":
        return replace(entry, state="built", build=build, costs=costs.measured(build, settings))
    server = serving(cell, stack.python, make, settings, records)
    if server is not None and server.wheel is not None:
        return replace(entry, state="served", reason=f"by {server.wheel.filename}", build=server)
    past = [build for build in records if build.recipe == cell.recipe and build.outcome == "built"]
    like = history.like(plan) if plan is not None else _like(cell, recipe, stack)
    entry = replace(entry, costs=costs.estimated(like, past, settings))
    if plan is None:
        return replace(entry, state="blocked", reason=blocked)
    if locked(record.lock_path(settings, plan.build_id)):
        return replace(entry, state="running")
    if build is None or build.failure is None:
        return replace(entry, reason=to_fetch.sentence(plan, settings))
    # A failed fetch says nothing about the cell.
    state: CellOutcome = "blocked" if build.failure.exit_code in (ExitCode.FETCH, ExitCode.HOST) else "failed"
    return replace(entry, state=state, reason=INTERRUPTED if build.unfinished else build.failure.cause, build=build)


def _like(cell: Cell, recipe: Recipe, stack: LoadedStack) -> Likeness:
    """The likeness of a cell that cannot be planned."""
    ptx = device_code.first(stack.asked_ptx, recipe.wheel.ptx, stack.data.ptx)
    facts = {"sm": sorted(stack.sm), "ptx": ptx} if recipe.build.cuda else {}
    return record.likeness(cell.stack, {"target": cell.target.value, "stack": facts})


def serving(
    cell: Cell, python: str, make: Callable[[Cell], Plan], settings: Settings, records: Sequence[Record]
) -> Record | None:
    """The build of the same cell for another Python whose wheel has the stable ABI, and so serves this Python.

    Its build id must be the current one; `python`: the cell's Python, as 3.13.
    """
    for build in records:
        alike = (build.recipe, build.stack, build.inputs.get("target")) == (cell.recipe, cell.stack, cell.target.value)
        if alike and build.interpreter != cell.interpreter and fits(build, python):
            with suppress(ConfigError, HostError):
                plan = make(replace(cell, interpreter=build.interpreter))
                if plan.build_id == build.build_id and record.wheel_path(settings, build) is not None:
                    return build
    return None


def fits(build: Record, python: str) -> bool:
    """Whether a build's wheel has the stable ABI, and so serves this Python."""
    if build.wheel is None:
        return False
    tags = parse_wheel_filename(split_label(build.wheel.filename)[0])[3]
    return any(tag.abi.startswith("abi3") and serves(tag, python) for tag in tags)


def served_by(build: Record, plan: Plan) -> str:
    """A sentence about a plan whose cell the wheel of a build serves."""
    name = build.wheel.filename if build.wheel is not None else ""
    return f"{plan.title}: {name} also fits this Python, because its ABI is stable"


def document(name: str, selector: str, reports: Sequence[CellReport]) -> dict[str, object]:
    """The document of `builder matrix --json` and of `PUT /matrix/NAME` of the index (docs/schema/matrix.json)."""
    return {"name": name, "selector": selector, "made": record.now(), "cells": [_row(entry) for entry in reports]}


def _row(entry: CellReport) -> dict[str, object]:
    data, plan, build = entry.stack.data, entry.plan, entry.build
    device = entry.recipe.build.cuda
    return {
        "recipe": entry.cell.recipe,
        "version": entry.recipe.version,
        "stack": entry.cell.stack,
        "torch": data.torch.version if device and data.torch is not None else "",
        "cuda": data.cuda if device else "",
        "python": entry.stack.python,
        "interpreter": entry.cell.interpreter or ROOT,
        "target": entry.cell.target.value,
        "sm": list(entry.stack.sm) if device else [],
        "state": entry.state,
        "build_id": build.build_id if build is not None else plan.build_id if plan is not None else None,
        "wheel": build.wheel.filename if build is not None and build.wheel is not None else None,
        "reason": entry.reason,
        "cpu_seconds": entry.costs.cpu_seconds,
        "disk_bytes": entry.costs.disk_bytes,
        "estimate": entry.costs.estimate,
    }
