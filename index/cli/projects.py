"""Commands for projects and releases: host, status, yank, delete."""

from __future__ import annotations

import click

from gracefarm.console import counted
from index.cli.common import IndexContext, in_context
from index.names import normalise
from index.store import projects


@click.command("host")
@in_context
@click.argument("names", nargs=-1)
@click.option("--remove", is_flag=True, help="Refuse uploads for these projects from now on. Existing files stay.")
def host(context: IndexContext, names: tuple[str, ...], remove: bool) -> None:
    """Allow uploads for projects, or list the projects that accept uploads.

    NAMES are names of projects (packages). Without NAMES, the command lists the projects that accept uploads.

    \b
    # Allow uploads for two projects.
    index host causal-conv1d flash-attn
    """
    catalogue = context.catalogue()
    if names:
        projects.host(catalogue, context.actor, [normalise(name) for name in names], hosted=not remove)
    hosted = projects.hosted(catalogue)
    context.console.result(hosted, "\n".join(hosted))


@click.command("status")
@in_context
@click.argument("name")
@click.argument("status", type=click.Choice(["active", "archived", "deprecated", "quarantined"]))
@click.option("--reason", default="", help="Reason to show on the page of the project.")
def status(context: IndexContext, name: str, status: str, reason: str) -> None:
    """Set the status of a project, such as deprecated.

    NAME is the name of a project (a package). The web page of the project shows the status, and the simple API (PEP 792)
    sends it to installers:

    \b
    active       the default
    deprecated   users should use a different project
    archived     the index refuses uploads
    quarantined  the index refuses uploads, and offers no files of the project

    \b
    # Mark flash-attn as deprecated.
    index status flash-attn deprecated --reason "use flash-attn-3"
    """
    projects.set_status(context.catalogue(), context.actor, normalise(name), status, reason)
    context.console.result({"name": name, "status": status}, f"{name}: {status}")


@click.command("yank")
@in_context
@click.argument("name")
@click.argument("version")
@click.option("--reason", default="", help="Reason that pip and uv show to users who install the release.")
def yank(context: IndexContext, name: str, version: str, reason: str) -> None:
    """Mark a release as yanked: installers no longer choose it (PEP 592).

    A release is all files of one version of the project NAME. If exactly this version is required, installers still install
    it. `index unyank` undoes the command.

    \b
    # Yank version 1.7.0 of causal-conv1d.
    index yank causal-conv1d 1.7.0 --reason "wrong results on sm 100"
    """
    count = projects.yank(context.catalogue(), context.actor, normalise(name), version, reason)
    _show(context, name, version, count, "yanked")


@click.command("unyank")
@in_context
@click.argument("name")
@click.argument("version")
def unyank(context: IndexContext, name: str, version: str) -> None:
    """Undo `index yank` for a release.

    A release is all files of one version of the project NAME. Installers can then choose this version again.

    \b
    # Make version 1.7.0 of causal-conv1d available again.
    index unyank causal-conv1d 1.7.0
    """
    count = projects.yank(context.catalogue(), context.actor, normalise(name), version, None)
    _show(context, name, version, count, "unyanked")


@click.command("delete")
@in_context
@click.argument("name")
@click.argument("version")
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
def delete(context: IndexContext, name: str, version: str, yes: bool) -> None:
    """Delete all files of a release permanently.

    A release is all files of one version of the project NAME. Files with the same names can never be uploaded again. The
    command asks for confirmation. `index gc` then frees the disk space.

    \b
    # Delete version 1.7.0 of causal-conv1d.
    index delete causal-conv1d 1.7.0
    """
    if not yes:
        click.confirm(f"delete every file of {name} {version}? Their names cannot be used again", abort=True, err=True)
    count = projects.delete(context.catalogue(), context.actor, normalise(name), version)
    _show(context, name, version, count, "deleted")


def _show(context: IndexContext, name: str, version: str, count: int, what: str) -> None:
    context.console.result(
        {"name": name, "version": version, "files": count}, f"{name} {version}: {counted(count, 'file')} {what}"
    )
