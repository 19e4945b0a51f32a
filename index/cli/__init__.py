"""`index`: the command line. It only parses, calls and prints. The module of a command is imported when it is called."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import click

from gracefarm import console
from gracefarm.cli import SETTINGS, LazyGroup, json_requested
from gracefarm.console import Console
from index.cli.common import IndexContext, root_option
from index.store.files import Store

COMMANDS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        # name: (module:function, summary for --help), in the order of a typical workflow
        "serve": ("index.cli.serve:serve", "Run the index server until Ctrl-C."),
        "token": ("index.cli.tokens:token", "Create, list and revoke upload tokens."),
        "publisher": ("index.cli.publishers:publisher", "Allow CI workflows to upload without a stored token."),
        "host": ("index.cli.projects:host", "Allow uploads for projects, or list the projects that accept uploads."),
        "status": ("index.cli.projects:status", "Set the status of a project, such as deprecated."),
        "yank": ("index.cli.projects:yank", "Mark a release as yanked: installers no longer choose it."),
        "unyank": ("index.cli.projects:unyank", "Undo `index yank` for a release."),
        "delete": ("index.cli.projects:delete", "Delete all files of a release permanently."),
        "stage": ("index.cli.sets:stage", "Create, fill and publish sets of wheels."),
        "mirror": ("index.cli.mirror:mirror", "Add the packages of a lock file to a set."),
        "withdraw": ("index.cli.mirror:withdraw", "Remove a mirrored file (see `index mirror`) from all sets."),
        "export": ("index.cli.folders:export", "Write the index as static files."),
        "import": ("index.cli.folders:import_", "Import the wheels and source archives (sdists) in a folder."),
        "fsck": ("index.cli.upkeep:fsck", "Check the sha256 of every stored file."),
        "gc": ("index.cli.upkeep:gc", "Delete stored files that the index no longer needs."),
        "prune": ("index.cli.upkeep:prune", "Delete old wheels of the nightly channel."),
        "stats": ("index.cli.upkeep:stats", "List the projects, with the number and size of their files."),
        "schema": ("index.cli.documents:schema", "Print the JSON schemas of matrices and certificates."),
        "log": ("index.cli.upkeep:log", "Show the audit log: all changes of the index."),
    }
)


@click.group(cls=LazyGroup, table=COMMANDS, context_settings=SETTINGS)
@root_option()
@click.version_option(package_name="gracefarm")
@click.pass_context
def cli(context: click.Context, root: Path | None) -> None:
    """Run a package index for pip and uv, and accept uploads of wheels.

    All data of the index is in one folder (--root). Run all commands on the machine with this folder. They also work while
    the server is running.

    \b
    # Allow uploads for the project causal-conv1d.
    index host causal-conv1d
    # Create an upload token that is valid for 90 days.
    index token create --name ci --expires 90d
    # Start the server on port 8080.
    index serve
    """
    if root is None:
        from gracefarm import settings  # imported here: a server with --root starts more quickly without it

        root = settings.load().home / "index"
    context.obj = IndexContext(store=Store(root=root.absolute()), console=Console(as_json=json_requested()))


def main() -> None:
    """Entry point of the console script and of `python -m index`."""
    console.run(lambda: cli.main(standalone_mode=False, prog_name="index"), as_json=json_requested(), extra="index")
