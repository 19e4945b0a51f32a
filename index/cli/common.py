"""Code that the commands share."""

from __future__ import annotations

import getpass
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from gracefarm.cli import json_option
from gracefarm.console import Console
from index.store.catalogue import Catalogue, open_catalogue
from index.store.files import Store


@dataclass(frozen=True, kw_only=True)
class IndexContext:
    """The context that every command receives."""

    store: Store
    console: Console

    def catalogue(self) -> Catalogue:
        """The catalogue of the root; created if it does not exist."""
        self.store.prepare()
        catalogue = open_catalogue(self.store.catalogue_path)
        click.get_current_context().call_on_close(catalogue.close)
        return catalogue

    @property
    def actor(self) -> str:
        """The name of the current user in the audit log."""
        try:
            return f"cli:{getpass.getuser()}"
        except (KeyError, OSError):
            return f"cli:{os.getuid()}"


_ROOT_HELP = (
    "Folder with the data of the index. Default: the environment variable GRACEFARM_INDEX_ROOT, else GRACEFARM_HOME/index "
    "(usually ~/.cache/gracefarm/index)."
)


def root_option(*names: str, **more: Any) -> Callable[[click.decorators.FC], click.decorators.FC]:
    """The option --root."""
    folder = click.Path(file_okay=False, path_type=Path)
    return click.option("--root", *names, type=folder, envvar="GRACEFARM_INDEX_ROOT", help=_ROOT_HELP, **more)


def in_context(command: Callable[..., None]) -> Callable[..., None]:
    """Pass the context to the command, and accept `--json` and `--root` after its name too."""
    option = root_option("_root", expose_value=False, callback=_set_root, is_eager=True)
    return json_option(option(click.make_pass_decorator(IndexContext)(command)))


def _set_root(context: click.Context, _parameter: click.Parameter, value: Path | None) -> None:
    if value is not None and isinstance(context.find_root().obj, IndexContext):
        context.find_root().obj = context.obj = IndexContext(
            store=Store(root=value.absolute()), console=context.find_root().obj.console
        )
