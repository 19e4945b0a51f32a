"""`index`: the command line. Parses, calls, prints; nothing else. A command's module is imported when it is called."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import click

from gracefarm import console
from gracefarm.cli import SETTINGS, LazyGroup, json_option
from gracefarm.console import Console
from index.cli.common import IndexContext, root_option
from index.store.files import Store

COMMANDS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        # name: (module:function, what --help says of it), in the order in which they are used
        "serve": ("index.cli.serve:serve", "Serve the index until interrupted."),
        "token": ("index.cli.tokens:token", "Who may upload."),
        "publisher": ("index.cli.publishers:publisher", "The workflows that may upload without a stored token."),
        "host": ("index.cli.projects:host", "Name the projects that this index hosts; without NAMES, list them."),
        "status": ("index.cli.projects:status", "Say how a project is (PEP 792)."),
        "yank": ("index.cli.projects:yank", "Keep a release for those who pinned it, and from everybody else (PEP 592)."),
        "unyank": ("index.cli.projects:unyank", "Take a yank back."),
        "delete": ("index.cli.projects:delete", "Delete a release."),
        "stage": ("index.cli.sets:stage", "Sets of wheels that become visible at once."),
        "mirror": ("index.cli.mirror:mirror", "Bring the wheels of a lock into a set, by sha256."),
        "withdraw": ("index.cli.mirror:withdraw", "Take a mirrored file out of every set, published ones too."),
        "export": ("index.cli.folders:export", "Write (or update) a static tree for nginx or an object store."),
        "import": ("index.cli.folders:import_", "Take in every wheel and sdist of a folder, as pypiserver keeps them."),
        "fsck": ("index.cli.upkeep:fsck", "Rehash everything that is stored."),
        "gc": ("index.cli.upkeep:gc", "Free the space of what nothing names any more."),
        "prune": ("index.cli.upkeep:prune", "Delete old nightlies."),
        "stats": ("index.cli.upkeep:stats", "What the index holds."),
        "schema": ("index.cli.documents:schema", "JSON schemas of matrices and certificates, for programs that put them."),
        "log": ("index.cli.upkeep:log", "The audit log: who did what, when."),
    }
)


@click.group(cls=LazyGroup, table=COMMANDS, context_settings=SETTINGS)
@json_option
@root_option()
@click.version_option(package_name="gracefarm")
@click.pass_context
def cli(context: click.Context, root: Path | None) -> None:
    """A package index for CUDA wheels: uploads checked, pages ready before they are asked for."""
    if root is None:
        from gracefarm import settings  # here: a server that is told its root starts quicker without

        root = settings.load().home / "index"
    context.obj = IndexContext(store=Store(root=root.absolute()), console=Console(as_json="--json" in sys.argv))


def main() -> None:
    """Entry point of the console script and of `python -m index`."""
    console.run(lambda: cli.main(standalone_mode=False), as_json="--json" in sys.argv, extra="index")
