"""`builder fetch`: what a recipe pins, fetched, verified and made into a source tree, without building anything."""

from __future__ import annotations

import click

from builder.cli.options import json_option, start
from builder.planning import gaps, recipe
from builder.planning.settings import Settings
from builder.upkeep.clean import FETCHED
from gracefarm.console import Console
from gracefarm.errors import GracefarmError, SeveralError
from gracefarm.files import lock, remove_tree


@click.command("fetch")
@click.argument("names", nargs=-1, required=True)
@json_option
def fetch_command(names: tuple[str, ...], as_json: bool) -> None:
    """Fetch and verify the sources of recipes, and apply their patches and substitutions: a line for each part.

    Commits, trees, submodules and digests are compared with what the recipe pins. A file whose digest is not known yet is left
    out and named. `builder build` begins with the same.

    \b
    builder fetch flash_attn
    builder fetch triton aphrodite --json
    """
    settings, console = start(as_json=as_json)
    failures: list[GracefarmError] = []
    for name in names:
        try:
            _fetch_one(name, settings, console)
        except GracefarmError as error:
            if len(names) == 1:
                raise
            console.error(error)
            failures.append(error)
    if failures:
        raise SeveralError(f"{len(failures)} of {len(names)} recipes failed; each is described above")


def _fetch_one(name: str, settings: Settings, console: Console) -> None:
    from builder import fetch
    from builder.fetch import source

    loaded = recipe.load(settings.project / "recipes", name)
    with console.progress("fetch") as tick:
        fetched = fetch.fetch(loaded.data, settings, tick, lambda text: console.step("fetch", text))
    epoch = source.source_date_epoch(loaded.data, fetched)
    tree = settings.home / FETCHED / loaded.key
    tree.parent.mkdir(parents=True, exist_ok=True)
    with lock(settings.home / "locks" / f"{FETCHED}-{loaded.key}"):
        try:
            source.unpack(loaded, fetched, tree, epoch, lambda text: console.step("source", text))
        finally:
            remove_tree(tree)
    missing = gaps.of_recipe(loaded)
    value = {
        "recipe": loaded.key,
        "source_date_epoch": epoch,
        "gaps": [{"what": gap.what, "url": gap.url, "reason": gap.reason} for gap in missing],
    }
    count = "1 file without a digest is" if len(missing) == 1 else f"{len(missing)} files without a digest are"
    left = f"; {count} left out" if missing else ""
    console.result(value, f"{loaded.key}: all that is pinned is here and fits{left}")
