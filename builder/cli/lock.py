"""`builder lock`: fill in the digests that were not known where a recipe or stack was written."""

from __future__ import annotations

import click

from builder import gaps, recipe, stack
from gracefarm import settings as settings_module
from gracefarm.console import Console


@click.command("lock")
@click.argument("name")
@click.option("--stack", "stack_name", metavar="NAME", help="Stack whose gaps are filled in too; default: the recipe's.")
@click.option("--json", "as_json", is_flag=True, help="JSON lines for machines.")
def lock(name: str, stack_name: str | None, as_json: bool) -> None:
    """Fill in the digests of NAME, a recipe (with its stack) or a stack, that were not known where it was written.

    The file comes over the network once, unchecked; its digest is written into the TOML for a person to compare and commit.

    \b
    builder lock triton
    builder lock cu124
    """
    settings, console = settings_module.load(), Console(as_json=as_json)
    if stack_name is None and name in stack.names(settings.project / "stacks"):
        loaded, base = None, stack.load(settings.project / "stacks", name)
    else:
        loaded = recipe.load(settings.project / "recipes", name)
        base = stack.load(settings.project / "stacks", stack_name or loaded.data.stack)
    with console.progress("lock") as tick:
        done = gaps.fill(loaded, base, settings, tick)
    rows = [{"file": str(gap.file), "what": gap.what, "url": gap.url, "sha256": sha256} for gap, sha256 in done]
    lines = [f"{row['sha256']}  {row['what']}  {row['url']}" for row in rows]
    console.result(rows, "\n".join(lines) or f"{name} has no gap: every digest is there")
