"""What is done to projects and releases: host, status, yank, delete."""

from __future__ import annotations

import click

from index.cli.common import IndexContext, in_context
from index.names import normalise
from index.store import projects


@click.command("host")
@in_context
@click.argument("names", nargs=-1)
@click.option("--remove", is_flag=True, help="Take no more uploads for these names; what is there stays.")
def host(context: IndexContext, names: tuple[str, ...], remove: bool) -> None:
    """Name the projects that this index hosts; without NAMES, list them."""
    catalogue = context.catalogue()
    if names:
        projects.host(catalogue, context.actor, [normalise(name) for name in names], hosted=not remove)
    hosted = projects.hosted(catalogue)
    context.console.result(hosted, "\n".join(hosted))


@click.command("status")
@in_context
@click.argument("name")
@click.argument("status", type=click.Choice(["active", "archived", "deprecated", "quarantined"]))
@click.option("--reason", default="")
def status(context: IndexContext, name: str, status: str, reason: str) -> None:
    """Say how a project is (PEP 792). A quarantined one offers no file."""
    projects.set_status(context.catalogue(), context.actor, normalise(name), status, reason)
    context.console.result({"name": name, "status": status}, f"{name}: {status}")


@click.command("yank")
@in_context
@click.argument("name")
@click.argument("version")
@click.option("--reason", default="", help="Installers print it.")
def yank(context: IndexContext, name: str, version: str, reason: str) -> None:
    """Keep a release for those who pinned it, and from everybody else (PEP 592)."""
    count = projects.yank(context.catalogue(), context.actor, normalise(name), version, reason)
    _show(context, name, version, count, "yanked")


@click.command("unyank")
@in_context
@click.argument("name")
@click.argument("version")
def unyank(context: IndexContext, name: str, version: str) -> None:
    """Take a yank back."""
    count = projects.yank(context.catalogue(), context.actor, normalise(name), version, None)
    _show(context, name, version, count, "unyanked")


@click.command("delete")
@in_context
@click.argument("name")
@click.argument("version")
@click.option("--yes", is_flag=True, help="Do not ask.")
def delete(context: IndexContext, name: str, version: str, yes: bool) -> None:
    """Delete a release. Its file names are never usable again."""
    if not yes:
        click.confirm(f"delete every file of {name} {version}? Their names can never be used again", abort=True, err=True)
    count = projects.delete(context.catalogue(), context.actor, normalise(name), version)
    _show(context, name, version, count, "deleted")


def _show(context: IndexContext, name: str, version: str, count: int, what: str) -> None:
    context.console.result({"name": name, "version": version, "files": count}, f"{name} {version}: {count} files {what}")
