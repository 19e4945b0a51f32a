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
    """Create, fill and publish sets of wheels.

    A set is a group of wheels that become visible together. A new set is staged: pip and uv do not see its wheels. After
    `index stage publish`, pip and uv can install all wheels of the set from /NAME/simple/.

    \b
    # Create the set spring, which must contain one wheel.
    index stage create spring --expect 'causal-conv1d==1.7.0 cp311 aarch64'
    # Show which wheels are missing.
    index stage list
    # Publish the set.
    index stage publish spring
    """


@stage.command("create")
@in_context
@click.argument("name")
@click.option(
    "--expect",
    multiple=True,
    metavar="LINE",
    help="Wheels that the set must contain. Format: PROJECT==VERSION PYTHONS ARCHITECTURES. Commas separate several Pythons "
    "or architectures. The option can be repeated.",
)
@click.option(
    "--matrix",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="File with wheels that the set must contain. Each line has the format of --expect.",
)
@click.option(
    "--without",
    multiple=True,
    metavar="PROJECT",
    help="Project that may be missing in the set, even if wheels of the set require it. The option can be repeated.",
)
@click.option(
    "--nightly", is_flag=True, help="Publish the wheels in the nightly channel (/nightly/simple/) instead of /simple/."
)
def create(
    context: IndexContext, name: str, expect: tuple[str, ...], matrix: Path | None, without: tuple[str, ...], nightly: bool
) -> None:
    """Create the staged set NAME.

    A set is a group of wheels that become visible together, when you publish the set. The command prints two paths of the
    index. You upload the wheels to the first path, /stage/NAME/legacy/. The second path is secret. With this path, pip and
    uv can install the staged wheels.

    \b
    # Create the set spring, which must contain two wheels of causal-conv1d.
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

    A set is a group of wheels that become visible together. The states are staged
    (not visible yet), published, and dropped (deleted).

    \b
    # Print the sets as JSON, with all of their files.
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
    """Add files of this index to the staged set NAME.

    A set is a group of wheels that become visible together. FILENAMES are complete names of files that were uploaded to this
    index.

    \b
    # Add a wheel to the set spring.
    index stage add spring causal_conv1d-1.7.0-cp311-cp311-linux_aarch64.whl
    """
    staged.add(context.catalogue(), context.actor, name, list(filenames))
    context.console.result({"name": name, "added": len(filenames)}, f"{name}: {len(filenames)} added")


@stage.command("publish")
@in_context
@click.argument("name")
def publish(context: IndexContext, name: str) -> None:
    """Make all wheels of the set NAME visible at /NAME/simple/.

    A set is a group of wheels that become visible together. Wheels that were uploaded to this index also become visible at
    /simple/ and on the web pages. Mirrored wheels (see `index mirror`) do not become visible at /simple/. If the set was
    created with --nightly, the uploaded wheels become visible at /nightly/simple/ instead of /simple/. The command fails if
    an expected wheel is missing in the set, or if a package that the wheels require is missing. A published set cannot be
    changed.

    \b
    # Publish the set spring.
    index stage publish spring
    """
    published = staged.publish(context.store, context.catalogue(), context.actor, name)
    context.console.result(asdict(published), f"{name}: {len(published.files)} files are visible at /{name}/simple/")


@stage.command("pylock")
@in_context
@click.argument("name")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def put_pylock(context: IndexContext, name: str, file: Path) -> None:
    """Add a pylock.toml to the staged set NAME.

    A set is a group of wheels that become visible together. FILE is a lock file in the format of PEP 751. The index serves
    FILE at /NAME/pylock.toml. `index stage publish` fails if a package in FILE is missing in the set.

    \b
    # Add pylock.toml to the set spring.
    index stage pylock spring pylock.toml
    """
    staged.put_pylock(context.catalogue(), context.actor, name, file.read_bytes())
    context.console.result({"name": name, "pylock": True}, f"{name}: {pylock.FILENAME} is stored")


@stage.command("drop")
@in_context
@click.argument("name")
def drop(context: IndexContext, name: str) -> None:
    """Drop the staged set NAME, and delete its unpublished files.

    A set is a group of wheels that become visible together, when you publish the set. Files that are also in another set are
    not deleted. A published set cannot be dropped. The name of a dropped set cannot be used for a new set.

    \b
    # Drop the set spring.
    index stage drop spring
    """
    staged.drop(context.catalogue(), context.actor, name)
    context.console.result({"name": name, "state": "dropped"}, f"{name}: dropped")
