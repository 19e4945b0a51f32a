"""Maintenance and inspection of a store: fsck, gc, prune, stats, log."""

from __future__ import annotations

from dataclasses import asdict

import click

from gracefarm.console import counted
from index.cli.common import IndexContext, in_context
from index.errors import DamagedError
from index.store import upkeep


@click.command("fsck")
@in_context
@click.option(
    "--set-aside",
    is_flag=True,
    help="Remove damaged files from the index. The same files can then be uploaded again.",
)
def fsck(context: IndexContext, set_aside: bool) -> None:
    """Check the sha256 of every stored file.

    The command prints the number of damaged files, and the number of stored files that the index no longer needs. If files
    are damaged, it fails and lists them.

    \b
    # Check all files.
    index fsck
    # Check all files, and remove the damaged files from the index.
    index fsck --set-aside
    """
    with context.console.progress("fsck") as tick:
        inspection = upkeep.fsck(context.store, context.catalogue(), tick, set_aside=context.actor if set_aside else None)
    context.console.result(
        asdict(inspection),
        f"{counted(inspection.files, 'file')}, {inspection.bytes} bytes, {len(inspection.damaged)} damaged,"
        f" {inspection.unnamed} unreferenced",
    )
    if inspection.damaged:
        raise DamagedError(
            f"damaged or missing files: {', '.join(inspection.damaged[:20])}",
            remedy="restore the files from a backup, or run `index fsck --set-aside` and upload the files again",
        )


@click.command("gc")
@in_context
def gc(context: IndexContext) -> None:
    """Delete stored files that the index no longer needs.

    These are, for example, the files of deleted releases. The command prints how much disk space becomes free.

    \b
    # Delete the files.
    index gc
    """
    count, size = upkeep.gc(context.store, context.catalogue(), context.actor)
    context.console.result({"files": count, "bytes": size}, f"{counted(count, 'file')} removed, {size} bytes")


@click.command("prune")
@in_context
@click.option(
    "--keep",
    default=14,
    show_default=True,
    type=click.IntRange(1),
    help="Number of newest versions to keep, for each combination of project, CUDA version, Python and platform.",
)
@click.option("--dry-run", is_flag=True, help="List the files that would be deleted. Do not delete them.")
def prune(context: IndexContext, keep: int, dry_run: bool) -> None:
    """Delete old wheels of the nightly channel.

    The nightly channel contains the wheels at /nightly/simple/. Wheels in sets (see `index stage`) stay. `index gc` then
    frees the disk space.

    \b
    # List the wheels that are older than the newest 14 versions.
    index prune --keep 14 --dry-run
    """
    names = upkeep.prune(context.catalogue(), context.actor, keep, dry_run=dry_run)
    context.console.result(names, "\n".join([*names, f"{len(names)} {'would be ' if dry_run else ''}deleted"]))


@click.command("stats")
@in_context
def stats(context: IndexContext) -> None:
    """List the projects, with the number and size of their files.

    Each line shows a project, and the number of its releases, files and bytes.

    \b
    index stats
    """
    catalogue = context.catalogue()
    rows = catalogue.rows(
        "SELECT project, count(DISTINCT version) AS releases, count(*) AS files, sum(size) AS bytes FROM live_file"
        " GROUP BY project ORDER BY project"
    )
    lines = [
        f"{row['project']:<32} {row['releases']:>5} releases {row['files']:>6} files {row['bytes']:>14} bytes" for row in rows
    ]
    context.console.result({"serial": catalogue.serial(), "projects": [dict(row) for row in rows]}, "\n".join(lines))


@click.command("log")
@in_context
@click.option("--since", default=0, type=int, help="Show only the changes whose serial number is higher than this number.")
def log(context: IndexContext, since: int) -> None:
    """Show the audit log: all changes of the index.

    Each line shows the serial number of a change, its time, the user or token, the action, and what was changed.

    \b
    # Show the changes with serial number 121 and higher.
    index log --since 120
    """
    rows = context.catalogue().rows("SELECT * FROM audit WHERE serial > ? ORDER BY serial", (since,))
    lines = [f"{row['serial']:>6} {row['time']} {row['actor']:<20} {row['action']:<16} {row['subject']}" for row in rows]
    context.console.result([dict(row) for row in rows], "\n".join(lines))
