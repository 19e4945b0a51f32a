"""What the modules of the command line share."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import click

from deploy.nodes.deployment import Deployment, load_deployment
from gracefarm.console import Console

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Context:
    """What every command has."""

    file: Path | None
    console: Console

    @cached_property
    def deployment(self) -> Deployment:
        """Of --file, else of the nearest deploy.toml. Raises ConfigError."""
        return load_deployment(self.file)


pass_context = click.make_pass_decorator(Context)


def wait(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end. Ctrl-C cancels it, lets it clean up, and comes out as KeyboardInterrupt (exit code 130)."""
    return asyncio.run(work)
