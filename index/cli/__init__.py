"""`index`: the command line. Parses, calls, prints; nothing else. A command's module is imported when it is called."""

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
        "serve": ("index.cli.serve:serve", "Serve the index until interrupted."),
        "token": ("index.cli.tokens:token", "Create, list and revoke upload tokens."),
        "publisher": ("index.cli.publishers:publisher", "Manage the workflows that may upload without a stored token."),
        "host": ("index.cli.projects:host", "Accept uploads for projects."),
        "status": ("index.cli.projects:status", "Set a project's status (PEP 792)."),
        "yank": ("index.cli.projects:yank", "Yank a release, so that new installs do not select it."),
        "unyank": ("index.cli.projects:unyank", "Undo a yank."),
        "delete": ("index.cli.projects:delete", "Delete a release permanently."),
        "stage": ("index.cli.sets:stage", "Create, fill and publish sets of wheels."),
        "mirror": ("index.cli.mirror:mirror", "Mirror the wheels of a lock into a set."),
        "withdraw": ("index.cli.mirror:withdraw", "Remove a mirrored file from every set."),
        "export": ("index.cli.folders:export", "Write or update static files for nginx or an object store."),
        "import": ("index.cli.folders:import_", "Import the wheels and sdists of a folder."),
        "fsck": ("index.cli.upkeep:fsck", "Check the sha256 of every stored file."),
        "gc": ("index.cli.upkeep:gc", "Delete stored files that nothing refers to."),
        "prune": ("index.cli.upkeep:prune", "Delete old nightlies."),
        "stats": ("index.cli.upkeep:stats", "Show projects with their number of releases, files and bytes."),
        "schema": ("index.cli.documents:schema", "Print the JSON schemas of matrices and certificates."),
        "log": ("index.cli.upkeep:log", "Show the audit log: the changes, with time and user."),
    }
)


@click.group(cls=LazyGroup, table=COMMANDS, context_settings=SETTINGS)
@root_option()
@click.version_option(package_name="gracefarm")
@click.pass_context
def cli(context: click.Context, root: Path | None) -> None:
    """Serve CUDA wheels to pip and uv, with checked uploads.

    \b
    index host causal-conv1d
    index token create --name ci --expires 90d
    index serve
    """
    if root is None:
        from gracefarm import settings  # imported here: a server with --root starts more quickly without it

        root = settings.load().home / "index"
    context.obj = IndexContext(store=Store(root=root.absolute()), console=Console(as_json=json_requested()))


def main() -> None:
    """Entry point of the console script and of `python -m index`."""
    console.run(lambda: cli.main(standalone_mode=False, prog_name="index"), as_json=json_requested(), extra="index")
