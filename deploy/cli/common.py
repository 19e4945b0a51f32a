"""What the modules of the command line share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import click
from rich.console import Console as RichConsole

from deploy.nodes.deployment import Deployment, load_deployment
from gracefarm.cli import json_option
from gracefarm.console import Console

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class DeployContext:
    """What every command has."""

    file: Path | None
    console: Console

    @cached_property
    def deployment(self) -> Deployment:
        """Of --file, else of the nearest deploy.toml. Raises ConfigError."""
        return load_deployment(self.file)


pass_context = click.make_pass_decorator(DeployContext)


def reporting(command: Callable[Concatenate[DeployContext, P], R]) -> Callable[P, R]:
    """A command that gets the DeployContext and takes --json."""
    return json_option(pass_context(command))


def output() -> RichConsole:
    """stdout for tables: as wide as the terminal, else wide enough for every column."""
    return RichConsole(highlight=False, width=None if sys.stdout.isatty() else 127)
