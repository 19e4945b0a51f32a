"""The state of each cell of a matrix: built, served by the wheel of another cell, failed, blocked or not tried."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

from packaging.utils import parse_wheel_filename

from builder.flow import history
from builder.planning.matrix import ROOT, Cell
from builder.planning.plan import Plan
from builder.planning.recipe import Recipe
from builder.planning.settings import Settings
from builder.planning.stack import LoadedStack
from builder.proof import record
from builder.proof.record import Record
from gracefarm.errors import ConfigError, ExitCode, HostError
from gracefarm.pythons import serves
from gracefarm.variants import split_label

CellOutcome = Literal["built", "served", "failed", "blocked", "not tried"]


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
    "The first error of a failed cell; the reason of a blocked one; or the wheel that serves it."
    build: Record | None = None
    "The record of this cell, or of the cell that serves it."
    cpu_seconds: float | None = None
    "Of the cell's build; if it is not built: of the last build of a similar cell of the recipe, else of any cell."
    disk_bytes: int | None = None
    "Size of the build's folder."


def report(
    cell: Cell,
    recipe: Recipe,
    stack: LoadedStack,
    make: Callable[[Cell], Plan],
    settings: Settings,
    records: Sequence[Record],
) -> CellReport:
    """The state of a cell; `make` plans it, `records` are all records of this machine, newest first."""
    past = [build for build in records if build.recipe == cell.recipe and build.outcome == "built"]
    unknown = CellReport(
        cell=cell,
        recipe=recipe,
        stack=replace(stack, asked_sm=cell.sm),
        plan=None,
        state="not tried",
        cpu_seconds=_cpu(past[0]) if past else None,
    )
    plan, build, blocked = None, None, ""
    try:
        plan = make(cell)
        plan.require_digests()
        build = record.read(settings, plan.build_id)
    except (ConfigError, HostError) as error:
        plan, blocked = None, error.cause
    alike = next((build for build in past if plan is not None and build.like == history.like(plan)), None)
    unknown = replace(unknown, cpu_seconds=_cpu(alike) if alike is not None else unknown.cpu_seconds)
    if build is None or build.failure is not None:
        server = serving(cell, stack.python, make, settings, records)
        if server is not None and server.wheel is not None:
            reason = f"by {server.wheel.filename}"
            return replace(unknown, plan=plan, state="served", reason=reason, build=server, cpu_seconds=None)
    if blocked:
        return replace(unknown, state="blocked", reason=blocked)
    if build is None:
        return replace(unknown, plan=plan)
    if build.failure is not None:
        # A failed fetch says nothing about the cell.
        state: CellOutcome = "blocked" if build.failure.exit_code in (ExitCode.FETCH, ExitCode.HOST) else "failed"
        return replace(unknown, plan=plan, state=state, reason=build.failure.cause, build=build)
    files = (path for path in record.folder(settings, build.build_id).rglob("*") if path.is_file() and not path.is_symlink())
    disk = sum(path.stat().st_size for path in files)
    return replace(unknown, plan=plan, state="built", build=build, cpu_seconds=_cpu(build), disk_bytes=disk)


def serving(
    cell: Cell, python: str, make: Callable[[Cell], Plan], settings: Settings, records: Sequence[Record]
) -> Record | None:
    """The build of the same cell for another Python whose wheel has the stable ABI, and so serves this Python.

    Its build id must be the current one; `python`: the cell's Python, as 3.13.
    """
    for build in records:
        alike = (build.recipe, build.stack, build.inputs.get("target")) == (cell.recipe, cell.stack, cell.target.value)
        if alike and build.interpreter != cell.interpreter and build.wheel and _stable(build.wheel.filename, python):
            with suppress(ConfigError, HostError):
                plan = make(replace(cell, interpreter=build.interpreter))
                if plan.build_id == build.build_id and record.wheel_path(settings, build) is not None:
                    return build
    return None


def _stable(filename: str, python: str) -> bool:
    """Whether it is a wheel with the stable ABI for this Python."""
    tags = parse_wheel_filename(split_label(filename)[0])[3]
    return any(tag.abi.startswith("abi3") and serves(tag, python) for tag in tags)


def _cpu(build: Record) -> float:
    return round(sum(stage.cpu_s or 0 for stage in build.stages), 1)


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
        "cpu_seconds": entry.cpu_seconds,
        "disk_bytes": entry.disk_bytes,
    }
