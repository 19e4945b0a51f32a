"""Import a folder of wheels; export the index as a folder."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from gracefarm.console import counted
from gracefarm.errors import SeveralError
from index.cli.common import IndexContext, in_context
from index.intake.folder import import_folder
from index.web.export import export_tree


@click.command("export")
@in_context
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--url",
    help="Address at which the folder will be served. The web pages show this address.",
)
def export(context: IndexContext, folder: Path, url: str | None) -> None:
    """Write the index as static files.

    nginx or an object store can then serve FOLDER to pip and uv, without `index serve`. FOLDER must be new, empty, or an
    earlier export. If FOLDER is an earlier export, the command writes only the files that have changed.

    \b
    # Write the files into /srv/wheels.
    index export /srv/wheels --url https://wheels.example.com
    """
    with context.console.progress("export") as tick:
        exported = export_tree(context.store, context.catalogue(), folder, tick, url=url)
    context.console.result(
        asdict(exported),
        f"{folder}: {exported.written} written, {exported.kept} kept, {exported.removed} removed",
    )


@click.command("import")
@in_context
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--variants",
    is_flag=True,
    help="Also accept wheels with a variant label in their file name (PEP 825, a draft).",
)
def import_(context: IndexContext, folder: Path, variants: bool) -> None:
    """Import the wheels and source archives (sdists) in a folder.

    FOLDER can be the package folder of pypiserver. The command also reads the folders in FOLDER. It prints the number of
    imported files, and the reason for each file that it refuses.

    \b
    # Import all packages in ~/packages.
    index import ~/packages
    """
    with context.store.using_staging(), context.console.progress("import") as tick:
        imported = import_folder(context.store, context.catalogue(), context.actor, folder, tick, variants=variants)
    counts = f"{imported.created} imported, {imported.same} already stored, {len(imported.refused)} refused"
    context.console.result(asdict(imported), "\n".join([counts, *imported.refused]))
    if imported.refused:
        raise SeveralError(
            f"{counted(len(imported.refused), 'file')} refused", remedy="correct or remove these files, then repeat the import"
        )
