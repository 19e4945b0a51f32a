"""What became of each cell of a matrix: built, failed, blocked or not tried."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from builder.flow import history
from builder.planning.matrix import Cell
from builder.planning.plan import Plan
from builder.planning.recipe import Recipe
from builder.planning.settings import Settings
from builder.planning.stack import LoadedStack
from builder.proof import record
from builder.proof.record import Record
from gracefarm.errors import ConfigError, ExitCode, HostError

CellOutcome = Literal["built", "failed", "blocked", "not tried"]


@dataclass(frozen=True, kw_only=True)
class CellReport:
    """A cell and what is known of it on this machine."""

    cell: Cell
    recipe: Recipe
    stack: LoadedStack
    "With the cell's interpreter and architectures."
    plan: Plan | None
    "None: the cell cannot be planned."
    state: CellOutcome
    reason: str = ""
    "The first error of a failed cell; what blocks a blocked one."
    build: Record | None = None
    "Of exactly this cell."
    cpu_seconds: float | None = None
    "That the cell took; of one that is not built, what such a cell of the recipe took last, or else any."
    disk_bytes: int | None = None
    "Of the build's folder."


def report(
    cell: Cell,
    recipe: Recipe,
    stack: LoadedStack,
    make: Callable[[Cell], Plan],
    settings: Settings,
    records: Sequence[Record],
) -> CellReport:
    """The state of a cell; `make` plans it, `records` are all of this machine, newest first."""
    past = [build for build in records if build.recipe == cell.recipe and build.outcome == "built"]
    unknown = CellReport(
        cell=cell,
        recipe=recipe,
        stack=replace(stack, asked_sm=cell.sm),
        plan=None,
        state="not tried",
        cpu_seconds=_cpu(past[0]) if past else None,
    )
    try:
        plan = make(cell)
        plan.require_digests()
        build_id = plan.build_id
    except (ConfigError, HostError) as error:
        return replace(unknown, state="blocked", reason=error.cause)
    alike = next((build for build in past if build.like == history.like(plan)), None)
    unknown = replace(unknown, cpu_seconds=_cpu(alike) if alike is not None else unknown.cpu_seconds)
    build = record.read(settings, build_id)
    if build is None:
        return replace(unknown, plan=plan)
    if build.failure is not None:
        # What could not be fetched says nothing about the cell.
        state: CellOutcome = "blocked" if build.failure.exit_code in (ExitCode.FETCH, ExitCode.HOST) else "failed"
        return replace(unknown, plan=plan, state=state, reason=build.failure.cause, build=build)
    files = (path for path in record.folder(settings, build_id).rglob("*") if path.is_file() and not path.is_symlink())
    disk = sum(path.stat().st_size for path in files)
    return replace(unknown, plan=plan, state="built", build=build, cpu_seconds=_cpu(build), disk_bytes=disk)


def _cpu(build: Record) -> float:
    return round(sum(stage.cpu_s or 0 for stage in build.stages), 1)


def document(name: str, selector: str, reports: Sequence[CellReport]) -> dict[str, object]:
    """What `builder matrix --json` prints and `PUT /matrix/NAME` of the index takes (docs/schema/matrix.json)."""
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
        "target": entry.cell.target.value,
        "sm": list(entry.stack.sm) if device else [],
        "state": entry.state,
        "build_id": plan.build_id if plan is not None else None,
        "wheel": build.wheel.filename if build is not None and build.wheel is not None else None,
        "reason": entry.reason,
        "cpu_seconds": entry.cpu_seconds,
        "disk_bytes": entry.disk_bytes,
    }
