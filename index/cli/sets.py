"""`index stage`: create, fill and publish sets."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from gracefarm.cli import CommandGroup
from gracefarm.console import counted
from index.cli.common import IndexContext, in_context
from index.sets import pylock, staged


@click.group("stage", cls=CommandGroup)
def stage() -> None:
    """Create, fill and publish sets of wheels. All wheels of a set become visible together.

    \b
    index stage create spring --expect 'causal-conv1d==1.7.0 cp311 aarch64'
    index stage list
    index stage publish spring
    """


@stage.command("create")
@in_context
@click.argument("name")
@click.option(
    "--expect",
    multiple=True,
    metavar="LINE",
    help="Wheel that the set must contain, such as 'causal-conv1d==1.7.0 cp311 aarch64'. Repeatable.",
)
@click.option(
    "--matrix",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="File with the expected wheels, one per line.",
)
@click.option(
    "--without",
    multiple=True,
    metavar="PROJECT",
    help="Project that the set may lack, although wheels of the set require it. Repeatable.",
)
@click.option("--nightly", is_flag=True, help="Publish the files of the set in the nightly channel.")
def create(
    context: IndexContext, name: str, expect: tuple[str, ...], matrix: Path | None, without: tuple[str, ...], nightly: bool
) -> None:
    """Create a staged set. Uploads to /stage/NAME/legacy/ add wheels to it.

    \b
    index stage create spring --expect 'causal-conv1d==1.7.0 cp311,cp312 aarch64'
    """
    lines = [*expect, *(matrix.read_text().splitlines() if matrix else [])]
    created = staged.create(
        context.catalogue(),
        context.actor,
        name,
        staged.parse_matrix(lines),
        channel="nightly" if nightly else "release",
        without=without,
    )
    context.console.result(
        {**asdict(created), "upload_path": f"/stage/{name}/legacy/", "preview_path": f"/preview/{created.preview}/simple/"},
        f"upload to /stage/{name}/legacy/\npreview at /preview/{created.preview}/simple/",
    )


@stage.command("list")
@in_context
def list_(context: IndexContext) -> None:
    """List all sets, with the state and the missing wheels of each.

    \b
    index stage list --json
    """
    sets = staged.all_sets(context.catalogue())
    lines = []
    for item in sets:
        lines.append(f"{item.name:<24} {item.state:<10} {counted(len(item.files), 'file')}, {len(item.missing)} missing")
        if item.state == "staged":
            lines.append(f"    preview /preview/{item.preview}/simple/")
        lines += [f"    lacks {missing}" for missing in item.missing]
    context.console.result([asdict(item) for item in sets], "\n".join(lines))


@stage.command("add")
@in_context
@click.argument("name")
@click.argument("filenames", nargs=-1, required=True)
def add(context: IndexContext, name: str, filenames: tuple[str, ...]) -> None:
    """Add files of this index to a set.

    \b
    index stage add spring causal_conv1d-1.7.0-cp311-*.whl
    """
    staged.add(context.catalogue(), context.actor, name, list(filenames))
    context.console.result({"name": name, "added": len(filenames)}, f"{name}: {len(filenames)} added")


@stage.command("publish")
@in_context
@click.argument("name")
def publish(context: IndexContext, name: str) -> None:
    """Make the whole set visible at /NAME/simple/. Its uploaded files also become visible at /simple/ and on the other pages.

    \b
    index stage publish spring
    """
    published = staged.publish(context.store, context.catalogue(), context.actor, name)
    context.console.result(asdict(published), f"{name}: {len(published.files)} files are visible at /{name}/simple/")


@stage.command("pylock")
@in_context
@click.argument("name")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def put_pylock(context: IndexContext, name: str, file: Path) -> None:
    """Store the pylock.toml (PEP 751) of a staged set. The index serves it as /NAME/pylock.toml.

    \b
    index stage pylock spring pylock.toml
    """
    staged.put_pylock(context.catalogue(), context.actor, name, file.read_bytes())
    context.console.result({"name": name, "pylock": True}, f"{name}: {pylock.FILENAME} is stored")


@stage.command("drop")
@in_context
@click.argument("name")
def drop(context: IndexContext, name: str) -> None:
    """Drop a staged set, and delete its unpublished files that no other set contains.

    \b
    index stage drop spring
    """
    staged.drop(context.catalogue(), context.actor, name)
    context.console.result({"name": name, "state": "dropped"}, f"{name}: dropped")
