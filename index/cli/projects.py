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
@click.option("--remove", is_flag=True, help="Do not accept further uploads for these projects. Existing files stay.")
def host(context: IndexContext, names: tuple[str, ...], remove: bool) -> None:
    """Accept uploads for projects. Without NAMES, list the hosted projects.

    \b
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
@click.option("--reason", default="", help="Reason to show on the project's page.")
def status(context: IndexContext, name: str, status: str, reason: str) -> None:
    """Set a project's status (PEP 792). A quarantined project offers no files.

    \b
    index status flash-attn deprecated --reason "use flash-attn-3"
    """
    projects.set_status(context.catalogue(), context.actor, normalise(name), status, reason)
    context.console.result({"name": name, "status": status}, f"{name}: {status}")


@click.command("yank")
@in_context
@click.argument("name")
@click.argument("version")
@click.option("--reason", default="", help="Reason that installers print.")
def yank(context: IndexContext, name: str, version: str, reason: str) -> None:
    """Yank a release, so that new installs do not select it (PEP 592). Installs that pin it still work.

    \b
    index yank causal-conv1d 1.7.0 --reason "wrong results on sm 100"
    """
    count = projects.yank(context.catalogue(), context.actor, normalise(name), version, reason)
    _show(context, name, version, count, "yanked")


@click.command("unyank")
@in_context
@click.argument("name")
@click.argument("version")
def unyank(context: IndexContext, name: str, version: str) -> None:
    """Undo a yank.

    \b
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
    """Delete a release permanently. Its file names cannot be used again.

    \b
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
