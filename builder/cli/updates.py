"""`builder updates`: newer releases of torch, Python and the packages of the recipes."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime

import click

from builder.cli.options import start
from builder.upkeep import updates
from builder.upkeep.updates import Update
from gracefarm.cli import json_option
from gracefarm.errors import FetchError


@click.command("updates")
@click.option(
    "--min-age",
    "age",
    default="7d",
    show_default=True,
    metavar="TIME",
    help="Minimum age of the listed releases, such as 7d (days) or 12h (hours). Bad releases are often withdrawn in their "
    "first days.",
)
@json_option
def updates_command(age: str) -> None:
    """List newer releases of torch, Python and the packages of the recipes.

    The command looks for releases on the Python index and in the tags of git repositories. For Python, it uses the list of
    releases that uv can download. For each newer release, the command prints how to change the recipe, stack or interpreter.
    It does not change any file.

    \b
    # List the newer releases.
    builder updates
    # List only releases that are at least 14 days old. Print them as JSON.
    builder updates --min-age 14d --json
    """
    min_age = updates.parse_age(age)
    settings, console = start()
    with console.progress("updates") as tick:
        pins = updates.find(settings, min_age, datetime.now(UTC), tick)
    shown = [update for update in pins if update.newest or update.waiting or update.error]
    rows = [line for update in shown for line in _lines(update)]
    current = len(pins) - len(shown)
    console.result([asdict(update) for update in pins], "\n".join([*rows, f"{current} of {len(pins)} pins are up to date"]))
    failed = [update for update in pins if update.error]
    if failed and len(failed) == len(pins):
        raise FetchError(
            f"no upstream server answered: {failed[0].error}", remedy="check the network, then repeat the command"
        )


def _lines(update: Update) -> list[str]:
    """What people read of one pin."""
    title = f"{update.kind:6}  {update.name:18} {update.current}"
    if update.error:
        return [f"{title}: {update.error}"]
    if update.newest is None:
        return [f"{title}: {update.waiting} is too young"]
    age = f"{update.age_days} days old" if update.age_days is not None else "age unknown"
    young = f"; {update.waiting} is too young" if update.waiting else ""
    return [f"{title} > {update.newest} ({age}{young})", f"        {update.change}"]
