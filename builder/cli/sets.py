"""`builder set`: build, test and publish wheels together."""

from __future__ import annotations

from typing import Any

import click

from builder.cli.accept import accept_new, accept_option, yes_option
from builder.cli.options import jobs_option, start, with_trees
from builder.planning import stack
from builder.planning.settings import Settings
from builder.proof import materials, record
from builder.sets import definition, plan
from builder.sets.plan import SetPlan
from gracefarm import extras
from gracefarm.cli import CommandGroup, json_option


@click.group("set", cls=CommandGroup, renamed={"lock": "builder lock SET"})
def set_command() -> None:
    """Build, test and publish several wheels together.

    A set (a folder in sets/) lists recipes to build wheels from, and packages to get from the Python index. A recipe
    describes how to build one package. All wheels of a set are tested in one environment.

    \b
    # List the sets.
    builder set list
    # Show what the build of the set gh200-cu130 would do.
    builder set plan gh200-cu130
    # Build and test the set, and write its lock files for this index.
    builder set build gh200-cu130 --index http://127.0.0.1:8080
    """


@set_command.command("list")
@json_option
def list_command() -> None:
    """List the sets, with the stack, the recipes and a summary of each.

    A set (a folder in sets/) is a list of wheels that are built, tested and published together.

    \b
    builder set list
    """
    settings, console = start()
    rows = []
    for name in definition.names(settings):
        wheels = definition.load(name, settings).data
        rows.append({"set": name, "stack": wheels.stack, "recipes": list(wheels.recipes), "summary": wheels.summary})
    lines = [
        f"{row['set']:16} {row['stack']:8} {', '.join(row['recipes']) or 'builds no wheels'}\n{'':16} {row['summary']}"
        for row in rows
    ]
    console.result(rows, "\n".join(lines) or "no sets")


@set_command.command("plan")
@click.argument("name")
@with_trees
@json_option
def plan_command(name: str, from_source: tuple[str, ...]) -> None:
    """Show what the build of a set would do, without starting it.

    NAME is a set (a folder in sets/). A set lists wheels that are built, tested and published together. The output shows the
    wheels to build, in the order of the builds. For each of these wheels, it shows the sources, and whether the wheel is
    built already. The output also shows the wheels from the Python index, the tests, and the files whose digest (sha256) is
    unknown.

    \b
    # Show what the build of the set gh200-cu124 would do.
    builder set plan gh200-cu124
    # Show what the same build would do with LLVM from source.
    builder set plan gh200-cu124 --llvm source
    """
    settings, console = start()
    planned = _planned(name, from_source, settings)
    value = _described(planned, settings)
    console.result(value, _lines(planned, value))


def _planned(name: str, from_source: tuple[str, ...], settings: Settings) -> SetPlan:
    return plan.plan_set(definition.load(name, settings).with_trees(from_source), stack.host_arch())


def _described(planned: SetPlan, settings: Settings) -> dict[str, Any]:
    builds = [
        {
            "recipe": build.recipe.key,
            "name": build.recipe.data.name,
            "version": build.recipe.data.version,
            "build_id": build.build_id,
            "sources": [material.__dict__ for material in materials.of(build.inputs)],
            "built": record.existing(build, settings) is not None,
            "trees": [
                {
                    "recipe": tree.recipe.key,
                    "build_id": tree.build_id,
                    "built": record.tree_path(settings, tree.build_id).is_dir(),
                }
                for tree in build.trees
            ],
        }
        for build in planned.builds
    ]
    return {
        "set": planned.set.data.name,
        "set_id": planned.set_id,
        "stack": planned.set.data.stack,
        "target": planned.set.data.target.value,
        "builds": builds,
        "wheels": [{"name": wheel.name, "version": wheel.version, "sha256": wheel.sha256 or None} for wheel in planned.wheels],
        "gaps": [{"what": gap.what, "url": gap.url, "reason": gap.reason} for gap in planned.gaps()],
        "together": planned.set.data.together.model_dump(mode="json"),
    }


def _lines(planned: SetPlan, value: dict[str, Any]) -> str:
    wanted = planned.set.data
    lines = [f"{wanted.name} for {wanted.target.value}, stack {wanted.stack}", f"set id    {planned.set_id}", ""]
    for number, build in enumerate(value["builds"], 1):
        state = "built" if build["built"] else "not built"
        lines.append(f"build {number}   {build['name']} {build['version']}, build id {build['build_id']}: {state}")
        lines += [
            f"          {source['algorithm']}:{source['digest'] or 'no digest'}  {source['what']}"
            for source in build["sources"]
        ]
        for tree in build["trees"]:
            state = "built" if tree["built"] else "not built; it is built first"
            lines.append(f"          tree {tree['recipe']}, build id {tree['build_id']}: {state}")
    lines += ["", f"runs with {len(planned.wheels)} wheels"]
    lines += [
        f"          {f'sha256:{wheel.sha256}' if wheel.sha256 else 'no digest'}  {wheel.name} {wheel.version}"
        for wheel in planned.wheels
    ]
    lines += ["", f"together  {', '.join(wanted.together.imports)}"]
    lines += [f"          {' '.join(command)}" for command in wanted.together.commands]
    lines += [f"no digest {gap['what']}  {gap['url']}: {gap['reason']}" for gap in value["gaps"]]
    return "\n".join(lines)


@set_command.command("build")
@click.argument("name")
@with_trees
@jobs_option
@click.option(
    "--index",
    "index_url",
    metavar="URL",
    help="Address of the index that will serve the set, such as http://HOST:8080. The command then also writes pylock.toml, "
    "which contains the address of each file on this index.",
)
@click.option(
    "--stage",
    "stage_url",
    metavar="URL",
    help="Address of the index to upload the set to. The index shows the set only when all of its wheels are uploaded.",
)
@click.option(
    "--as", "shown_as", metavar="NAME", help="Name that the set gets on the index. Default: the name of its folder in sets/."
)
@accept_option
@yes_option
@json_option
def build_command(
    name: str,
    from_source: tuple[str, ...],
    jobs: int | None,
    index_url: str | None,
    stage_url: str | None,
    shown_as: str | None,
    accepts: bool,
    yes: bool,
) -> None:
    """Build the wheels of a set, test them in one environment, and write the lock files of the set.

    NAME is a set (a folder in sets/). A set lists wheels that are built, tested and published together. The command prints
    the paths of the lock files and of the record (set.json, which contains the results). With --stage, the command also
    uploads the set to an index and publishes it there. The environment variables TWINE_USERNAME and TWINE_PASSWORD contain
    the user name and the password for the upload.

    \b
    # Build and test the set.
    builder set build gh200-cu130
    # Ask whether to accept the files whose digest is unknown, then build.
    builder set build gh200-cu124 --accept-new
    # First build LLVM from source, instead of downloading LLVM's archive.
    builder set build gh200-cu124 --llvm source
    # Also write pylock.toml with the addresses of the files on this index.
    builder set build gh200-cu130 --index http://10.0.0.1:8080
    # Also upload the set to this index, and publish it.
    builder set build gh200-cu130 --stage http://10.0.0.1:8080
    """
    from builder.proof import publish
    from builder.sets import build, locks  # clients of HTTP

    settings, console = start()
    for url in (index_url, stage_url):
        if url is not None:
            publish.refuse_credentials(url, "--stage")
    planned = _planned(name, from_source, settings)
    if accepts:
        accept_new([(planned.set.stack, planned.gaps())], settings, console, yes=yes)
        planned = _planned(name, from_source, settings)
    built = build.build_set(planned, jobs, settings, console)
    places = {"record": built.folder / "set.json", "lock": built.lock}
    if (url := index_url or stage_url) is not None:
        places["pylock"] = build.render(built, locks.served(url, shown_as or name))
    if stage_url is not None:
        build.stage(built, locks.served(stage_url, shown_as or name), settings, console)
    value = built.record.model_dump(mode="json") | {key: str(place) for key, place in places.items()}
    console.result(value, "\n".join(f"{key:7} {place}" for key, place in places.items()))


@set_command.command("run")
@click.argument("name")
@with_trees
@jobs_option
@json_option
def run_command(name: str, from_source: tuple[str, ...], jobs: int | None) -> None:
    """Run all steps of a set on this machine: build, test, publish, install and import.

    NAME is a set (a folder in sets/). A set lists wheels that are built, tested and published together. The command starts
    an index on this machine and uploads the built wheels to it. It copies the other wheels from the Python index into the
    new index. Then it installs the set from the new index into a new environment, checks the hash of each wheel, and imports
    the modules.

    \b
    # Run all steps of the set gh200-cu130.
    builder set run gh200-cu130
    """
    from builder.sets.run import run_set  # a client of HTTP

    extras.require("index")
    settings, console = start()
    result = run_set(_planned(name, from_source, settings), jobs, settings, console)
    value = result.__dict__ | {"tested": result.tested.model_dump(mode="json")}
    console.result(value, f"lock    {result.lock}\npylock  {result.pylock}")
