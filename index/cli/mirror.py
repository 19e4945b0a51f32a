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
@click.option(
    "--set",
    "set_name",
    required=True,
    help="Set to add the files to. If it does not exist, the command creates it.",
)
@click.option(
    "--link",
    is_flag=True,
    help="Do not store the files, but link to them on the Python index. The command still downloads each file once, to check "
    "the file.",
)
@click.option(
    "--platform",
    "platforms",
    multiple=True,
    help="Add only files for this platform, such as aarch64 or manylinux_2_34_aarch64. The option can be repeated.",
)
@click.option(
    "--python",
    "pythons",
    multiple=True,
    help="Add only files for this Python, such as 3.11. The option can be repeated.",
)
def mirror(
    context: IndexContext, lock: Path, set_name: str, link: bool, platforms: tuple[str, ...], pythons: tuple[str, ...]
) -> None:
    """Add the packages of a lock file to a set.

    A set is a group of wheels that become visible together (see `index stage`). LOCK is a requirements file that lists
    packages with versions and with the sha256 hashes of their files. The command downloads the files with these hashes from
    a Python index, and stores them. The environment variable GRACEFARM_PYTHON_INDEX contains the address of the Python
    index. If the variable is not set, the command uses the Python index that uv or pip uses. If a file was already uploaded
    to the index in --root, the command does not download this file.

    \b
    # Add all files of the lock to the set spring.
    index mirror requirements.lock --set spring
    # Add only the files for Python 3.11 on aarch64.
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
@click.option("--reason", default="", help="Reason to write into the audit log.")
@click.option("--undo", is_flag=True, help="Undo an earlier `index withdraw`: add the file to its sets again.")
def withdraw(context: IndexContext, filename: str, reason: str, undo: bool) -> None:
    """Remove a mirrored file (see `index mirror`) from all sets.

    A set is a group of wheels that become visible together. FILENAME is the name of the file. The index then answers
    requests for this file with the HTTP status 410 (Gone).

    \b
    # Withdraw a wheel with a vulnerability.
    index withdraw requests-2.32.3-py3-none-any.whl --reason CVE-2026-1234
    """
    sets = mirroring.withdraw(context.catalogue(), context.actor, filename, reason, undo=undo)
    what = "restored to" if undo else "withdrawn from"
    context.console.result({"filename": filename, "sets": sets}, f"{filename}: {what} {', '.join(sets)}")
