"""`builder set`: wheels that are built, tested and published together."""

from __future__ import annotations

from typing import Any

import click

from builder.ground import environment
from builder.planning import stack
from builder.proof import materials, record
from builder.sets import data as sets
from builder.sets import plan as planning
from builder.sets.plan import SetPlan
from gracefarm import settings as settings_module
from gracefarm.console import Console
from gracefarm.files import atomic_write
from gracefarm.settings import Settings

_as_json = click.option("--json", "as_json", is_flag=True, help="JSON lines for machines.")


@click.group("set")
def set_() -> None:
    """Wheels that are built, tested and published together (docs/sets.md).

    \b
    builder set list
    builder set plan gh200-cu130
    builder set build gh200-cu130 --index http://127.0.0.1:8080
    """


@set_.command("list")
@_as_json
def list_(as_json: bool) -> None:
    """Sets of this project."""
    settings, console = settings_module.load(), Console(as_json=as_json)
    rows = []
    for name in sets.names(settings):
        found = sets.load(name, settings).data
        rows.append({"set": name, "stack": found.stack, "recipes": list(found.recipes), "summary": found.summary})
    lines = [f"{row['set']:16} {row['stack']:8} {', '.join(row['recipes'])}\n{'':16} {row['summary']}" for row in rows]
    console.result(rows, "\n".join(lines) or "no sets")


@set_.command("lock")
@click.argument("name")
@_as_json
def lock(name: str, as_json: bool) -> None:
    """Resolve what NAME runs with, as it was before the set's date, and write its requirements.lock.

    \b
    builder set lock gh200-cu130
    """
    settings, console = settings_module.load(), Console(as_json=as_json)
    found = sets.load(name, settings)
    if not found.data.requirements:
        place = found.stack.requirements_lock
        console.result(
            {"written": []},
            f"{name} runs in the environment of stack {found.data.stack}: {place} (`{found.stack.lock_command}`)",
        )
        return
    with console.progress("lock") as tick:
        atomic_write(found.runtime.requirements_lock, environment.resolve(found.runtime, settings, tick))
    count = len(environment.wheels(found.runtime, found.data.target))
    place = found.runtime.requirements_lock
    console.result({"written": [str(place)], "wheels": count}, f"{place}: {count} wheels")


@set_.command("plan")
@click.argument("name")
@_as_json
def plan(name: str, as_json: bool) -> None:
    """Every digest of NAME (or the gap, named), the order of its builds, and what is built already.

    \b
    builder set plan gh200-cu124
    """
    settings, console = settings_module.load(), Console(as_json=as_json)
    made = planning.make(sets.load(name, settings), stack.host_arch())
    value = _described(made, settings)
    console.result(value, _lines(made, value))


def _described(made: SetPlan, settings: Settings) -> dict[str, Any]:
    builds = [
        {
            "recipe": one.recipe.key,
            "name": one.recipe.data.name,
            "version": one.recipe.data.version,
            "build_id": one.build_id,
            "sources": [material.__dict__ for material in materials.of(one.inputs)],
            "built": record.existing(one, settings) is not None,
        }
        for one in made.builds
    ]
    return {
        "set": made.set.data.name,
        "set_id": made.set_id,
        "stack": made.set.data.stack,
        "target": made.set.data.target.value,
        "builds": builds,
        "wheels": [{"name": one.name, "version": one.version, "sha256": one.sha256 or None} for one in made.wheels],
        "gaps": [{"what": one.what, "url": one.url, "reason": one.reason} for one in made.gaps()],
        "together": made.set.data.together.model_dump(mode="json"),
    }


def _lines(made: SetPlan, value: dict[str, Any]) -> str:
    data = made.set.data
    lines = [f"{data.name} for {data.target.value}, stack {data.stack}", f"set id    {made.set_id}", ""]
    for number, one in enumerate(value["builds"], 1):
        state = "built" if one["built"] else "not built"
        lines.append(f"build {number}   {one['name']} {one['version']}, build id {one['build_id']}: {state}")
        lines += [
            f"          {source['algorithm']}:{source['digest'] or 'no digest'}  {source['what']}" for source in one["sources"]
        ]
    lines += ["", f"runs with {len(made.wheels)} wheels"]
    lines += [
        f"          {f'sha256:{one.sha256}' if one.sha256 else 'no digest'}  {one.name} {one.version}" for one in made.wheels
    ]
    lines += ["", f"together  {', '.join(data.together.imports)}"]
    lines += [f"          {' '.join(command)}" for command in data.together.commands]
    lines += [f"no digest {one['what']}  {one['url']}: {one['reason']}" for one in value["gaps"]]
    return "\n".join(lines)


@set_.command("build")
@click.argument("name")
@click.option("--jobs", type=click.IntRange(1), help="Upper bound of parallel compilations.")
@click.option(
    "--index", "index_url", metavar="URL", help="Index that will serve the set: renders pylock.toml with its address."
)
@click.option(
    "--stage", "stage_url", metavar="URL", help="Stage the set at this index, and publish it once nothing is missing."
)
@click.option(
    "--as", "shown_as", metavar="NAME", help="The set's name at the index; default: NAME. A published set never changes."
)
@_as_json
def build(
    name: str, jobs: int | None, index_url: str | None, stage_url: str | None, shown_as: str | None, as_json: bool
) -> None:
    """Build the wheels of NAME, try them together in one environment, write its locks; stage and publish it.

    \b
    builder set build gh200-cu130
    builder set build gh200-cu130 --index http://10.0.0.1:8080
    TWINE_USERNAME=__token__ TWINE_PASSWORD=gf_… builder set build gh200-cu130 --stage http://10.0.0.1:8080
    """
    from builder.sets import flow, locks  # clients of HTTP

    settings, console = settings_module.load(), Console(as_json=as_json)
    flow.refuse_credentials(index_url, stage_url)
    done = flow.build(planning.make(sets.load(name, settings), stack.host_arch()), jobs, settings, console)
    places = {"record": done.folder / "set.json", "lock": done.lock}
    if (url := index_url or stage_url) is not None:
        places["pylock"] = flow.render(done, locks.served(url, shown_as or name))
    if stage_url is not None:
        flow.stage(done, locks.served(stage_url, shown_as or name), settings, console)
    value = done.record.model_dump(mode="json") | {key: str(place) for key, place in places.items()}
    console.result(value, "\n".join(f"{key:7} {place}" for key, place in places.items()))


@set_.command("run")
@click.argument("name")
@click.option("--jobs", type=click.IntRange(1), help="Upper bound of parallel compilations.")
@_as_json
def run(name: str, jobs: int | None, as_json: bool) -> None:
    """The whole way of NAME on this machine: build, test, stage at an index here, mirror, publish, install by hash, import.

    \b
    builder set run gh200-cu130
    """
    from builder.sets import rehearsal  # clients of HTTP

    settings, console = settings_module.load(), Console(as_json=as_json)
    done = rehearsal.rehearse(planning.make(sets.load(name, settings), stack.host_arch()), jobs, settings, console)
    value = done.__dict__ | {"tested": done.tested.model_dump(mode="json")}
    console.result(value, f"lock    {done.lock}\npylock  {done.pylock}")
