"""`builder init`: create a project folder with recipes, stacks and sets."""

from __future__ import annotations

import shutil
from pathlib import Path

import click

from builder.planning import matrix
from builder.planning.settings import PARTS, given_project
from gracefarm.cli import json_option, json_requested
from gracefarm.console import Console
from gracefarm.errors import UsageError
from gracefarm.files import atomic_directory


@click.command("init")
@click.argument("folder", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
@json_option
def init_command(folder: Path) -> None:
    """Create the project folder DIR with copies of gracefarm's recipes, stacks, interpreters and sets.

    A recipe describes how to build one package. A stack pins the versions of torch, CUDA, Python and the compilers. An
    interpreter is an additional version of Python for which wheels can be built. A set is a list of wheels that are
    published together. You can change the copies in DIR, and add new recipes, stacks, interpreters and sets. DIR must not
    exist, or must be empty.

    \b
    # Create the project folder wheels.
    builder init wheels
    """
    console = Console(as_json=json_requested())
    if folder.is_dir() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty", remedy="choose a new folder")
    with atomic_directory(folder.absolute()) as project:
        for part in PARTS:
            shutil.copytree(given_project() / part, project / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(given_project() / matrix.FILE, project / matrix.FILE)
    steps = [
        f"{folder} now contains recipes/, stacks/, interpreters/, sets/ and matrix.toml. Next:",
        f"  cd {folder} && builder list",
        "  builder plan causal_conv1d",
        "To add a recipe, run `builder new NAME` (docs/reference/recipes.md).",
    ]
    console.result({"project": str(folder.absolute())}, "\n".join(steps))
