"""`index mirror` and `index withdraw`: third-party wheels of sets."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from gracefarm import pins, settings
from gracefarm.console import counted
from index.cli.common import IndexContext, in_context
from index.sets import machines, mirroring, staged


@click.command("mirror")
@in_context
@click.argument("lock", type=click.Path(path_type=Path))
@click.option("--set", "set_name", required=True, help="Name of the set. The set is created if it does not exist.")
@click.option(
    "--link", is_flag=True, help="Store links to the upstream files instead of copies. Each file is fetched once, to check it."
)
@click.option(
    "--platform",
    "platforms",
    multiple=True,
    help="Mirror only files for this platform, such as aarch64 or manylinux_2_34_aarch64. Repeatable.",
)
@click.option("--python", "pythons", multiple=True, help="Mirror only files for this Python, such as 3.11. Repeatable.")
def mirror(
    context: IndexContext, lock: Path, set_name: str, link: bool, platforms: tuple[str, ...], pythons: tuple[str, ...]
) -> None:
    """Mirror the wheels of a lock into a set. They come from the configured Python index, and are selected by sha256.

    \b
    index mirror requirements.lock --set spring
    index mirror requirements.lock --set spring --platform aarch64 --python 3.11
    """
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
    hint = "" if state == "published" else f"; publish the set with `index stage publish {set_name}`"
    context.console.result([asdict(item) for item in mirrored], f"{set_name}: {counted(len(mirrored), 'file')}{hint}")


@click.command("withdraw")
@in_context
@click.argument("filename")
@click.option("--reason", default="", help="Reason for the audit log.")
@click.option("--undo", is_flag=True, help="Undo the withdrawal.")
def withdraw(context: IndexContext, filename: str, reason: str, undo: bool) -> None:
    """Remove a mirrored file from every set, including published sets. The index then answers 410 for this file.

    \b
    index withdraw requests-2.32.3-py3-none-any.whl --reason CVE-2026-1234
    """
    sets = mirroring.withdraw(context.catalogue(), context.actor, filename, reason, undo=undo)
    what = "restored to" if undo else "withdrawn from"
    context.console.result({"filename": filename, "sets": sets}, f"{filename}: {what} {', '.join(sets)}")
