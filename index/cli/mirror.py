"""Bring the wheels of a lock into a set, and take a mirrored file out of every set."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from gracefarm import pins, settings
from index.cli.common import IndexContext, in_context
from index.sets import machines, mirroring, staged


@click.command("mirror")
@in_context
@click.argument("lock", type=click.Path(path_type=Path))
@click.option("--set", "set_name", required=True, help="Created, staged, when there is none of that name.")
@click.option("--link", is_flag=True, help="Absolute links instead of copies.")
@click.option(
    "--platform", "platforms", multiple=True, help="Only files for it: aarch64, manylinux_2_34_aarch64. Can be repeated."
)
@click.option("--python", "pythons", multiple=True, help="Only files for it: 3.11. Can be repeated.")
def mirror(
    context: IndexContext, lock: Path, set_name: str, link: bool, platforms: tuple[str, ...], pythons: tuple[str, ...]
) -> None:
    """Bring the wheels of a lock into a set, by sha256, from the configured Python index."""
    manner = mirroring.Manner(link=link, selection=machines.select(platforms, pythons))
    locked = pins.read(lock, options=True)
    catalogue = context.catalogue()
    if catalogue.row("SELECT 1 FROM release_set WHERE name = ?", (set_name,)) is None:
        staged.create(catalogue, context.actor, set_name, [])
    with context.store.using_staging(), context.console.progress("mirror") as tick:
        mirrored = mirroring.mirror(
            context.store,
            catalogue,
            context.actor,
            set_name,
            lock.name,
            locked,
            index_url=settings.load().index_url,
            manner=manner,
            tick=tick,
        )
    state = staged.find(catalogue, set_name).state
    hint = "" if state == "published" else f"; `index stage publish {set_name}` shows the set"
    context.console.result([asdict(item) for item in mirrored], f"{set_name}: {len(mirrored)} files{hint}")


@click.command("withdraw")
@in_context
@click.argument("filename")
@click.option("--reason", default="", help="For the audit log.")
@click.option("--undo", is_flag=True, help="Take the withdrawal back.")
def withdraw(context: IndexContext, filename: str, reason: str, undo: bool) -> None:
    """Take a mirrored file out of every set, published ones too; a set lacks it then (410)."""
    sets = mirroring.withdraw(context.catalogue(), context.actor, filename, reason, undo=undo)
    what = "is back in" if undo else "is withdrawn from"
    context.console.result({"filename": filename, "sets": sets}, f"{filename} {what} {', '.join(sets)}")
