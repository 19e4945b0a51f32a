"""`builder fetch`: fetch and verify the sources of a recipe without building it."""

from __future__ import annotations

import click

from builder.cli.options import start
from builder.planning import gaps, recipe, stack
from builder.planning.settings import Settings
from builder.upkeep.clean import FETCHED
from gracefarm.cli import json_option
from gracefarm.console import Console
from gracefarm.errors import GracefarmError, SeveralError
from gracefarm.files import lock, remove_tree


@click.command("fetch")
@click.argument("names", nargs=-1, required=True)
@click.option(
    "--stack",
    "stack_name",
    metavar="NAME",
    help="Check the sources as a build for this stack (a folder in stacks/) uses them. A recipe can contain changes to the "
    "sources that apply only to some stacks. Default: the stack that the recipe names.",
)
@json_option
def fetch_command(names: tuple[str, ...], stack_name: str | None) -> None:
    """Download and check the sources of recipes.

    NAMES are recipes (folders in recipes/). A recipe describes how to build one package. The command compares the id of each
    commit and the digest (sha256) of each file with the values in the recipe. It also tests whether the patches of the
    recipe can be applied to the sources. The downloaded files stay on this machine for later builds. The command does not
    download files whose digest is unknown.

    \b
    # Download and check the sources of one recipe.
    builder fetch flash_attn
    # Download and check the sources of two recipes, for the stack cu130.
    builder fetch flash_attn aphrodite --stack cu130
    """
    settings, console = start()
    failures: list[GracefarmError] = []
    for name in names:
        try:
            _fetch_one(name, stack_name, settings, console)
        except GracefarmError as error:
            if len(names) == 1:
                raise
            console.error(error)
            failures.append(error)
    if failures:
        raise SeveralError(
            f"{len(failures)} of {len(names)} recipes failed; see the errors above",
            remedy="fix these errors, then repeat the command",
        )


def _fetch_one(name: str, stack_name: str | None, settings: Settings, console: Console) -> None:
    from builder import fetch
    from builder.fetch import crates, source

    loaded = recipe.load(settings.project / "recipes", name).for_host(stack.host_arch())
    loaded = loaded.against(stack.load(settings.project / "stacks", stack_name or loaded.data.stack))
    with console.progress("fetch") as tick:
        fetched = fetch.fetch(loaded.data, settings, tick, lambda text: console.step("fetch", text))
    epoch = source.source_date_epoch(loaded.data, fetched)
    tree = settings.home / FETCHED / loaded.key
    tree.parent.mkdir(parents=True, exist_ok=True)
    with lock(settings.home / "locks" / f"{FETCHED}-{loaded.key}"):
        try:
            source.unpack(loaded, fetched, tree, epoch, lambda text: console.step("source", text))
            with console.progress("fetch") as tick:
                crates.vendor(loaded, tree, tree / ".crates", settings, tick, lambda text: console.step("fetch", text))
        finally:
            remove_tree(tree)
    missing = gaps.of_recipe(loaded)
    value = {
        "recipe": loaded.key,
        "source_date_epoch": epoch,
        "gaps": [{"what": gap.what, "url": gap.url, "reason": gap.reason} for gap in missing],
    }
    count = "1 file with an unknown digest was" if len(missing) == 1 else f"{len(missing)} files with unknown digests were"
    left = f"; {count} skipped" if missing else ""
    console.result(value, f"{loaded.key}: all pinned files were fetched and match their pins{left}")
