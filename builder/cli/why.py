"""`builder why`: which input changed between two build ids, what else it rebuilds, how long that takes."""

from __future__ import annotations

import json
from pathlib import Path

import click

from builder.cli.options import as_built, json_option, last_build, placed, plan_of, start
from builder.planning import recipe
from builder.planning.stack import HOST_SUFFIX
from builder.proof import record, why
from gracefarm.errors import UsageError

_WIDTH = 70


@click.command("why")
@click.argument("name")
@click.argument("ids", nargs=-1, metavar="[ID ID]")
@placed
@json_option
def why_command(
    name: str, ids: tuple[str, ...], own: Path | None, python: str | None, cuda: Path | None, as_json: bool
) -> None:
    """Which input of NAME changed, from its last build here to what would be built now, or between two ids.

    \b
    builder why causal_conv1d
    builder why causal_conv1d 9acd96ed b1971544
    builder why causal_conv1d --environment ~/engine
    """
    if len(ids) not in (0, 2):
        raise UsageError("name two build ids, or none", remedy=f"builder why {name} ID ID")
    settings, console = start(as_json=as_json)
    loaded = recipe.load(settings.project / "recipes", name)
    if ids:
        old, new = (why.by_id(settings, loaded.key, prefix) for prefix in ids)
        new_id, inputs = new.build_id, new.inputs
    else:
        old = last_build(name, settings)
        stack_name, on = old.stack.removesuffix(HOST_SUFFIX), as_built(old, own, python, cuda)
        plan = plan_of(loaded.key, stack_name, str(old.inputs["target"]), settings, on)
        new_id, inputs = plan.build_id, json.loads(json.dumps(plan.inputs))  # as a record has them: no tuples
    changes = list(why.changes(old.inputs, inputs))
    records = record.all_of(settings)
    rebuilt = why.others(records, loaded.key, old, changes)
    took = why.seconds(records, old)
    value = {
        "before": old.build_id,
        "after": new_id,
        "changes": [change.__dict__ for change in changes],
        "seconds": took,
        "rebuilds": [rebuild.__dict__ for rebuild in rebuilt],
    }
    lines = [f"{old.build_id[:16]} > {new_id[:16]}"]
    if not changes:
        lines.append("nothing changed: the same inputs, the same id")
    lines += [f"changed   {change.path}: {_short(change.before)} > {_short(change.after)}" for change in changes]
    if changes:
        lines.append(f"rebuilds  {name}: {_time(took)}")
    lines += [f"rebuilds  {rebuild.recipe}: {_time(rebuild.seconds)}" for rebuild in rebuilt]
    console.result(value, "\n".join(lines))


def _short(value: object) -> str:
    text = "nothing" if value is None else json.dumps(value) if not isinstance(value, str) else value
    return text if len(text) <= _WIDTH else text[: _WIDTH - 1] + "…"


def _time(seconds: float | None) -> str:
    return "never built here, time unknown" if seconds is None else f"about {seconds / 60:.1f} min, as last time"
