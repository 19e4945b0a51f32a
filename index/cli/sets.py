"""`index stage`: sets, from the first staged wheel to the published whole."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from index.cli.common import IndexContext, in_context
from index.sets import pylock, staged


@click.group("stage")
def stage() -> None:
    """Sets of wheels that become visible at once."""


@stage.command("create")
@in_context
@click.argument("name")
@click.option(
    "--expect", multiple=True, metavar="LINE", help="A wheel the set must hold: 'causal-conv1d==1.7.0 cp311 aarch64'."
)
@click.option("--matrix", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A file of such lines.")
@click.option("--without", multiple=True, metavar="PROJECT", help="Its wheels may require this, and the set does without it.")
@click.option("--nightly", is_flag=True, help="Its files go to the nightly channel.")
def create(
    context: IndexContext, name: str, expect: tuple[str, ...], matrix: Path | None, without: tuple[str, ...], nightly: bool
) -> None:
    """Open a set; upload its wheels to /stage/NAME/legacy/."""
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
    """Every set, with what it still lacks."""
    sets = staged.all_sets(context.catalogue())
    lines = []
    for item in sets:
        lines.append(f"{item.name:<24} {item.state:<10} {len(item.files)} files, {len(item.missing)} missing")
        if item.state == "staged":
            lines.append(f"    preview /preview/{item.preview}/simple/")
        lines += [f"    lacks {missing}" for missing in item.missing]
    context.console.result([asdict(item) for item in sets], "\n".join(lines))


@stage.command("add")
@in_context
@click.argument("name")
@click.argument("filenames", nargs=-1, required=True)
def add(context: IndexContext, name: str, filenames: tuple[str, ...]) -> None:
    """Put files that are here already into a set."""
    staged.add(context.catalogue(), context.actor, name, list(filenames))
    context.console.result({"name": name, "added": len(filenames)}, f"{name}: {len(filenames)} added")


@stage.command("publish")
@in_context
@click.argument("name")
def publish(context: IndexContext, name: str) -> None:
    """Show the whole set at once, at /NAME/simple/ and in the other views."""
    published = staged.publish(context.store, context.catalogue(), context.actor, name)
    context.console.result(asdict(published), f"{name}: {len(published.files)} files are visible at /{name}/simple/")


@stage.command("pylock")
@in_context
@click.argument("name")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def put_pylock(context: IndexContext, name: str, file: Path) -> None:
    """Give a staged set its pylock.toml (PEP 751), to be served beside requirements.lock."""
    staged.put_pylock(context.catalogue(), context.actor, name, file.read_bytes())
    context.console.result({"name": name, "pylock": True}, f"{name}: {pylock.FILENAME} is kept")


@stage.command("drop")
@in_context
@click.argument("name")
def drop(context: IndexContext, name: str) -> None:
    """Give a staged set up."""
    staged.drop(context.catalogue(), context.actor, name)
    context.console.result({"name": name, "state": "dropped"}, f"{name}: dropped")
