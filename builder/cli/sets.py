"""`builder set`: build, test and publish wheels together."""

from __future__ import annotations

from typing import Any

import click

from builder.cli.accept import accept_new, accept_option, yes_option
from builder.cli.options import jobs_option, start
from builder.planning import stack
from builder.planning.settings import Settings
from builder.proof import materials, record
from builder.sets import definition, plan
from builder.sets.plan import SetPlan
from gracefarm import extras
from gracefarm.cli import CommandGroup, json_option


@click.group("set", cls=CommandGroup, renamed={"lock": "builder lock SET"})
def set_command() -> None:
    """Build, test and publish wheels together (docs/reference/sets.md).

    \b
    builder set list
    builder set plan gh200-cu130
    builder set build gh200-cu130 --index http://127.0.0.1:8080
    """


@set_command.command("list")
@json_option
def list_command() -> None:
    """List the sets of this project.

    \b
    builder set list
    """
    settings, console = start()
    rows = []
    for name in definition.names(settings):
        wheels = definition.load(name, settings).data
        rows.append({"set": name, "stack": wheels.stack, "recipes": list(wheels.recipes), "summary": wheels.summary})
    lines = [f"{row['set']:16} {row['stack']:8} {', '.join(row['recipes'])}\n{'':16} {row['summary']}" for row in rows]
    console.result(rows, "\n".join(lines) or "no sets")


@set_command.command("plan")
@click.argument("name")
@json_option
def plan_command(name: str) -> None:
    """Show the inputs of NAME with their digests, inputs with unknown digests, the build order, and existing builds.

    \b
    builder set plan gh200-cu124
    """
    settings, console = start()
    planned = plan.plan_set(definition.load(name, settings), stack.host_arch())
    value = _described(planned, settings)
    console.result(value, _lines(planned, value))


def _described(planned: SetPlan, settings: Settings) -> dict[str, Any]:
    builds = [
        {
            "recipe": build.recipe.key,
            "name": build.recipe.data.name,
            "version": build.recipe.data.version,
            "build_id": build.build_id,
            "sources": [material.__dict__ for material in materials.of(build.inputs)],
            "built": record.existing(build, settings) is not None,
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
@jobs_option
@click.option(
    "--index",
    "index_url",
    metavar="URL",
    help="Index that will serve the set. The URLs of the files on this index are written into pylock.toml.",
)
@click.option("--stage", "stage_url", metavar="URL", help="Stage the set on this index, and publish it when it is complete.")
@click.option("--as", "shown_as", metavar="NAME", help="Name of the set on the index. Default: NAME.")
@accept_option
@yes_option
@json_option
def build_command(
    name: str,
    jobs: int | None,
    index_url: str | None,
    stage_url: str | None,
    shown_as: str | None,
    accepts: bool,
    yes: bool,
) -> None:
    """Build the wheels of NAME, test them together in one environment, and write the set's locks.

    With --stage, also upload the set and publish it. TWINE_USERNAME and TWINE_PASSWORD hold the credentials.

    \b
    builder set build gh200-cu130
    builder set build gh200-cu124 --accept-new
    builder set build gh200-cu130 --index http://10.0.0.1:8080
    builder set build gh200-cu130 --stage http://10.0.0.1:8080
    """
    from builder.proof import publish
    from builder.sets import build, locks  # clients of HTTP

    settings, console = start()
    for url in (index_url, stage_url):
        if url is not None:
            publish.refuse_credentials(url, "--stage")
    planned = plan.plan_set(definition.load(name, settings), stack.host_arch())
    if accepts:
        accept_new([(planned.set.stack, planned.gaps())], settings, console, yes=yes)
        planned = plan.plan_set(definition.load(name, settings), stack.host_arch())
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
@jobs_option
@json_option
def run_command(name: str, jobs: int | None) -> None:
    """Run all steps for the set NAME on this machine: build, test, stage, mirror, publish, install by hash, import.

    \b
    builder set run gh200-cu130
    """
    from builder.sets.run import run_set  # a client of HTTP

    extras.require("index")
    settings, console = start()
    result = run_set(plan.plan_set(definition.load(name, settings), stack.host_arch()), jobs, settings, console)
    value = result.__dict__ | {"tested": result.tested.model_dump(mode="json")}
    console.result(value, f"lock    {result.lock}\npylock  {result.pylock}")
