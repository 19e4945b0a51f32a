"""`builder init`: a project folder of one's own, with recipes, stacks and sets."""

from __future__ import annotations

import shutil
from pathlib import Path

import click

from builder.cli.options import json_option
from builder.planning import matrix
from builder.planning.settings import PARTS, given_project
from gracefarm.console import Console
from gracefarm.errors import UsageError
from gracefarm.files import atomic_directory


@click.command("init")
@click.argument("folder", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
@json_option
def init_command(folder: Path, as_json: bool) -> None:
    """Make the project folder DIR: recipes, stacks, interpreters and sets to change, copied from this gracefarm.

    \b
    builder init wheels
    """
    console = Console(as_json=as_json)
    if folder.is_dir() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty", remedy="name a new folder")
    with atomic_directory(folder.absolute()) as project:
        for part in PARTS:
            shutil.copytree(given_project() / part, project / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(given_project() / matrix.FILE, project / matrix.FILE)
    steps = [
        f"{folder} holds recipes/, stacks/, interpreters/, sets/ and matrix.toml now. Next:",
        f"  cd {folder} && builder list",
        "  builder plan causal_conv1d",
        "A recipe of your own is a folder recipes/NAME with a recipe.toml (docs/recipes.md).",
    ]
    console.result({"project": str(folder.absolute())}, "\n".join(steps))
