"""Folders of wheels: take one in, write the index out as one."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from gracefarm.errors import SeveralError
from index.cli.common import IndexContext, in_context
from index.intake.folder import import_folder
from index.web.export import export_tree


@click.command("export")
@in_context
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--url", help="Address of the tree, as the pages for people print it.")
def export(context: IndexContext, folder: Path, url: str | None) -> None:
    """Write (or update) a static tree for nginx or an object store."""
    with context.console.progress("export") as tick:
        exported = export_tree(context.store, context.catalogue(), folder, tick, url=url)
    context.console.result(
        asdict(exported),
        f"{folder}: {exported.written} written, {exported.kept} kept, {exported.removed} removed",
    )


@click.command("import")
@in_context
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--variants", is_flag=True, help="Take variant wheels too (PEP 825, a draft).")
def import_(context: IndexContext, folder: Path, variants: bool) -> None:
    """Take in every wheel and sdist of a folder, as pypiserver keeps them."""
    with context.store.using_staging(), context.console.progress("import") as tick:
        imported = import_folder(context.store, context.catalogue(), context.actor, folder, tick, variants=variants)
    counts = f"{imported.created} taken in, {imported.same} here already, {len(imported.refused)} refused"
    context.console.result(asdict(imported), "\n".join([counts, *imported.refused]))
    if imported.refused:
        raise SeveralError(f"{len(imported.refused)} files were refused", remedy="mend or remove them, then import again")
