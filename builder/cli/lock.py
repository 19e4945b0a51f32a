"""`builder lock`: fill in the digests that were not known where a recipe or stack was written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import click

from builder.planning import gaps, recipe, stack
from gracefarm import settings as settings_module
from gracefarm.console import Console
from gracefarm.errors import GracefarmError, SeveralError


@click.command("lock")
@click.argument("name")
@click.option("--stack", "stack_name", metavar="NAME", help="Stack whose gaps are filled in too; default: the recipe's.")
@click.option(
    "--toolchain",
    type=click.Choice(["sandbox", "host", "container"]),
    default="sandbox",
    show_default=True,
    help="With container: the stack's container image too, which no other toolchain needs.",
)
@click.option("--json", "as_json", is_flag=True, help="JSON lines for machines.")
def lock(name: str, stack_name: str | None, toolchain: str, as_json: bool) -> None:
    """Fill in the digests of NAME, a recipe (with its stack) or a stack, that were not known where it was written.

    The file comes over the network once, unchecked; its digest is written into the TOML for a person to compare and commit.
    One that cannot be had stops no other.

    \b
    builder lock triton
    builder lock cu124
    builder lock flash_attn --toolchain container
    """
    settings, console = settings_module.load(), Console(as_json=as_json)
    if stack_name is None and name in stack.names(settings.project / "stacks"):
        loaded, base = None, stack.load(settings.project / "stacks", name)
    else:
        loaded = recipe.load(settings.project / "recipes", name)
        base = stack.load(settings.project / "stacks", stack_name or loaded.data.stack)
    with console.progress("lock") as tick:
        filled = gaps.fill(loaded, base, settings, tick, images=toolchain == "container")
    for gap in gaps.of_images(base) if toolchain != "container" else ():
        console.step("lock", f"left for --toolchain container: {gap.what}")
    rows = [{"file": str(gap.file), "what": gap.what, "url": gap.url, "sha256": sha256} for gap, sha256 in filled.done]
    lines = [f"{row['sha256']}  {row['what']}  {row['url']}" for row in rows]
    if filled.failed:
        if rows:
            console.result(rows, "\n".join(lines))
        _fail(filled.failed, len(filled.done), console)
    console.result(rows, "\n".join(lines) or f"{name} has no gap: every digest is there")


def _fail(failed: Sequence[GracefarmError], done: int, console: Console) -> NoReturn:
    """Each on its own, after all were tried; an only one is the command's own."""
    if len(failed) == 1:
        raise failed[0]
    for error in failed:
        console.error(error)
    raise SeveralError(f"{len(failed)} of {len(failed) + done} digests cannot be had; each is described above")
