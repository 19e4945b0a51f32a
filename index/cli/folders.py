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
@click.option("--url", help="Address at which the exported folder will be served; the web pages show it.")
def export(context: IndexContext, folder: Path, url: str | None) -> None:
    """Write or update static files for nginx or an object store.

    \b
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
@click.option("--variants", is_flag=True, help="Also accept variant wheels (PEP 825, a draft).")
def import_(context: IndexContext, folder: Path, variants: bool) -> None:
    """Import the wheels and sdists of a folder, such as the folder of pypiserver. Refused files are listed with the reason.

    \b
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
