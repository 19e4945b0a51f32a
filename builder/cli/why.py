"""`builder why`: the inputs that differ between two build ids, and the builds that this affects."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import click

from builder.cli.options import as_built, compared, last_build, plan_of, start
from builder.planning import matrix, recipe
from builder.planning.settings import Settings
from builder.planning.stack import HOST_SUFFIX
from builder.proof import judges, record, why
from builder.proof.record import Record
from builder.proof.why import CellChange, Change, Rebuild
from gracefarm.cli import json_option
from gracefarm.console import Console
from gracefarm.errors import GracefarmError, UsageError

_WIDTH = 70
_STATES = {"rebuilt": "to build again", "judged again": "to check again", "as they are": "unchanged"}
"The counts of JSON in words."


@click.command("why")
@click.argument("name", required=False)
@click.argument("ids", nargs=-1, metavar="[ID ID]")
@click.option(
    "--all",
    "every",
    is_flag=True,
    help="For each wheel that this machine has built, compare the inputs of its build with the current inputs. With NAME: "
    "do this only for the wheels of this recipe.",
)
@compared
@json_option
def why_command(
    name: str | None,
    ids: tuple[str, ...],
    every: bool,
    own: Path | None,
    python: str | None,
    cuda: Path | None,
) -> None:
    """Show which inputs of a build have changed.

    NAME is a recipe (a folder in recipes/). A recipe describes how to build one package. Inputs are everything that can
    change the wheel, such as sources, patches, options and compilers. The build id is the hash of the inputs. If an input
    has changed, `builder build` builds the wheel again.

    Without ids, the command compares the inputs of the last build of NAME with the current inputs. It
    determines the current inputs for the stack, architecture and toolchain of the last build. With two ids, the command
    compares the inputs of two builds of NAME. The first characters of a build id are sufficient. The command also lists the
    other recipes that the changes affect, and the duration of their last builds.

    \b
    # Show what has changed since the last build.
    builder why causal_conv1d
    # Compare two builds.
    builder why causal_conv1d 9acd96ed b1971544
    # Show what has changed since a build with --environment ~/engine.
    builder why causal_conv1d --environment ~/engine
    # Show what has changed for each wheel that this machine has built.
    builder why --all
    """
    if every and ids:
        raise UsageError("--all and build ids cannot be used together", remedy="omit the build ids")
    if name is None and not every:
        raise UsageError("give a recipe or --all", remedy="run `builder why NAME` or `builder why --all`")
    if len(ids) not in (0, 2):
        raise UsageError("give two build ids, or none", remedy=f"run `builder why {name} ID ID`")
    settings, console = start()
    if every:
        _every(name, own, python, cuda, settings, console)
        return
    assert name is not None
    loaded = recipe.load(settings.project / "recipes", name)
    if ids:
        old, new = (why.by_id(settings, loaded.key, prefix) for prefix in ids)
        new_id, inputs = new.build_id, new.inputs
    else:
        old = last_build(name, settings)
        stack_name, on = old.stack.removesuffix(HOST_SUFFIX), as_built(old, own, python, cuda)
        plan = plan_of(loaded.key, stack_name, str(old.inputs["target"]), settings, on)
        new_id, inputs = plan.build_id, json.loads(json.dumps(plan.inputs))  # without tuples, as in records
    changes = list(why.changes(old.inputs, inputs))
    records = record.all_of(settings)
    rebuilt = why.others(records, loaded.key, old, changes)
    _tell(name, (old.build_id, new_id), changes, why.seconds(records, old), rebuilt, console)


def _tell(
    name: str,
    builds: tuple[str, str],
    changes: Sequence[Change],
    took: float | None,
    rebuilt: Sequence[Rebuild],
    console: Console,
) -> None:
    """Show the changes between two builds, and what is built again. `took`: seconds of the recipe's last build."""
    before, after = builds
    value = {
        "before": before,
        "after": after,
        "changes": [change.__dict__ for change in changes],
        "seconds": took,
        "rebuilds": [rebuild.__dict__ for rebuild in rebuilt],
    }
    lines = [f"{before[:16]} > {after[:16]}"]
    if not changes:
        lines.append("nothing changed: the inputs and the build id are the same")
    lines += [f"changed   {change.path}: {_short(change.before)} > {_short(change.after)}" for change in changes]
    if changes:
        lines.append(f"rebuilds  {name}: {_time(took)}")
    lines += [f"rebuilds  {rebuild.recipe}: {_time(rebuild.seconds)}" for rebuild in rebuilt]
    console.result(value, "\n".join(lines))


def _every(
    name: str | None, own: Path | None, python: str | None, cuda: Path | None, settings: Settings, console: Console
) -> None:
    """Print which built cells change, and how many cells each changed input rebuilds."""
    key = recipe.load(settings.project / "recipes", name).key if name is not None else None
    records = record.all_of(settings)
    chosen = [build for build in why.cells(records) if key in (None, build.recipe)]
    entries = [_now(build, settings, own, python, cuda) for build in chosen]
    rebuilt = [entry for entry in entries if entry.rebuilt]
    seconds = [why.seconds(records, entry.build) or 0 for entry in rebuilt]
    inputs = Counter(path for entry in rebuilt for path in sorted({change.path for change in entry.changes}))
    counts = {
        "rebuilt": len(rebuilt),
        "judged again": sum(entry.judged_again for entry in entries),
        "blocked": sum(entry.build_id is None for entry in entries),
    }
    counts["as they are"] = len(entries) - sum(counts.values())
    lines = [f"changed   {path}: rebuilds {count} of {len(entries)} cells" for path, count in inputs.most_common()]
    lines += [_line(entry, records) for entry in entries if entry.rebuilt or entry.judged_again or entry.build_id is None]
    total = (
        ", ".join(f"{count} {_STATES.get(state, state)}" for state, count in counts.items() if count)
        or "no cell was built on this machine"
    )
    lines.append(
        f"{len(entries)} {'cell' if len(entries) == 1 else 'cells'}: {total}" + (f"; {_time(sum(seconds))}" if rebuilt else "")
    )
    rows = [_row(entry, seconds=why.seconds(records, entry.build)) for entry in entries]
    console.result({"cells": rows, "inputs": dict(inputs), "counts": counts, "seconds": sum(seconds)}, "\n".join(lines))


def _now(build: Record, settings: Settings, own: Path | None, python: str | None, cuda: Path | None) -> CellChange:
    """Compare the cell of a build with its current plan."""
    try:
        on = as_built(build, own, python, cuda)
        plan = plan_of(build.recipe, build.stack.removesuffix(HOST_SUFFIX), str(build.inputs["target"]), settings, on)
        build_id, inputs = plan.build_id, json.loads(json.dumps(plan.inputs))
        judged = judges.digest(plan)
    except GracefarmError as error:  # affects only this cell
        return CellChange(build=build, build_id=None, reason=error.cause)
    return CellChange(
        build=build,
        build_id=build_id,
        changes=tuple(why.changes(build.inputs, inputs)),
        judged_again=build_id == build.build_id and build.judged_by != judged,
    )


def _title(build: Record) -> str:
    sm = f" sm {'+'.join(build.asked_sm)}" if build.asked_sm is not None else ""
    return f"{build.recipe} {build.stack} {build.interpreter or matrix.ROOT} {build.inputs.get('target')}{sm}"


def _line(entry: CellChange, records: Sequence[Record]) -> str:
    if entry.build_id is None:
        return f"blocked   {_title(entry.build)}: {entry.reason}"
    if entry.judged_again:
        return (
            f"judges    {_title(entry.build)}: gates or smoke tests have changed; the wheel is checked again, not built again"
        )
    paths = ", ".join(sorted({change.path for change in entry.changes}))
    return f"rebuilds  {_title(entry.build)}: {paths}; {_time(why.seconds(records, entry.build))}"


def _row(entry: CellChange, *, seconds: float | None) -> dict[str, object]:
    build = entry.build
    return {
        "recipe": build.recipe,
        "stack": build.stack,
        "python": build.interpreter,
        "target": build.inputs.get("target"),
        "sm": build.asked_sm,
        "before": build.build_id,
        "after": entry.build_id,
        "changes": [change.__dict__ for change in entry.changes],
        "judged_again": entry.judged_again,
        "reason": entry.reason,
        "seconds": seconds,
    }


def _short(value: object) -> str:
    text = "nothing" if value is None else json.dumps(value) if not isinstance(value, str) else value
    return text if len(text) <= _WIDTH else text[: _WIDTH - 1] + "…"


def _time(seconds: float | None) -> str:
    return (
        "never built on this machine, duration unknown"
        if seconds is None
        else f"about {seconds / 60:.1f} min, as in the last build"
    )
