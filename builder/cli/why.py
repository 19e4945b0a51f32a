"""`builder why`: which input changed between two build ids, what else it rebuilds, how long that takes."""

from __future__ import annotations

import json
from pathlib import Path

import click

from builder.cli.options import as_built, placed, plan_of
from builder.planning import recipe
from builder.proof import record
from builder.proof import why as explaining
from builder.toolchains.host_tools import SUFFIX
from gracefarm import settings as settings_module
from gracefarm.console import Console
from gracefarm.errors import UsageError

_WIDTH = 70


@click.command("why")
@click.argument("name")
@click.argument("ids", nargs=-1, metavar="[ID ID]")
@placed
@click.option("--json", "as_json", is_flag=True, help="JSON lines for machines.")
def why(name: str, ids: tuple[str, ...], own: Path | None, python: Path | None, cuda: Path | None, as_json: bool) -> None:
    """Which input of NAME changed, from its last build here to what would be built now, or between two ids.

    \b
    builder why causal_conv1d
    builder why causal_conv1d 9acd96ed b1971544
    builder why causal_conv1d --environment ~/engine
    """
    if len(ids) not in (0, 2):
        raise UsageError("name two build ids, or none", remedy=f"builder why {name} ID ID")
    settings, console = settings_module.load(), Console(as_json=as_json)
    loaded = recipe.load(settings.project / "recipes", name)
    if ids:
        old, new = (explaining.by_id(settings, loaded.key, one) for one in ids)
        new_id, inputs = new.build_id, new.inputs
    else:
        old = record.latest(settings, loaded.key)
        made = plan_of(
            loaded.key,
            old.stack.removesuffix(SUFFIX),
            str(old.inputs["target"]),
            settings,
            as_built(old.inputs, own, python, cuda),
        )
        new_id, inputs = made.build_id, json.loads(json.dumps(made.inputs))  # as a record has them: no tuples
    found = list(explaining.changes(old.inputs, inputs))
    records = record.all_of(settings)
    rebuilt = explaining.others(records, loaded.key, old, found)
    took = explaining.seconds(records, old)
    value = {
        "before": old.build_id,
        "after": new_id,
        "changes": [one.__dict__ for one in found],
        "seconds": took,
        "rebuilds": [one.__dict__ for one in rebuilt],
    }
    lines = [f"{old.build_id[:16]} > {new_id[:16]}"]
    if not found:
        lines.append("nothing changed: the same inputs, the same id")
    lines += [f"changed   {one.path}: {_short(one.before)} > {_short(one.after)}" for one in found]
    if found:
        lines.append(f"rebuilds  {name}: {_time(took)}")
    lines += [f"rebuilds  {one.recipe}: {_time(one.seconds)}" for one in rebuilt]
    console.result(value, "\n".join(lines))


def _short(value: object) -> str:
    text = "nothing" if value is None else json.dumps(value) if not isinstance(value, str) else value
    return text if len(text) <= _WIDTH else text[: _WIDTH - 1] + "…"


def _time(seconds: float | None) -> str:
    return "never built here, time unknown" if seconds is None else f"about {seconds / 60:.1f} min, as last time"
