"""Code that the commands share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import click
import rich.console

from deploy.nodes.deployment import Deployment, load_deployment
from gracefarm.cli import json_option
from gracefarm.console import Console

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class DeployContext:
    """The context that every command receives."""

    file: Path | None
    console: Console

    @cached_property
    def deployment(self) -> Deployment:
        """The deployment of --file, else of the nearest deploy.toml. Raises ConfigError."""
        return load_deployment(self.file)


pass_context = click.make_pass_decorator(DeployContext)


nodes_option = click.option(
    "-k",
    "words",
    multiple=True,
    metavar="WORDS",
    help="Nodes, separated by commas. Each word is a name (k1), a range of numbers (2-5), an address, a group in deploy.toml, "
    "head (the first node) or rest (all nodes except the head).",
)
"Chooses nodes; the command receives `words`."


def reporting(command: Callable[Concatenate[DeployContext, P], R]) -> Callable[P, R]:
    """Pass the DeployContext to the command, and accept --json."""
    return json_option(pass_context(command))


def output() -> rich.console.Console:
    """stdout for tables: as wide as the terminal, or wide enough for all columns if it is not a terminal."""
    return rich.console.Console(highlight=False, width=None if sys.stdout.isatty() else 127)
