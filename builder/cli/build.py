"""`builder build` and `builder run`: recipes to wheels."""

from __future__ import annotations

from collections.abc import Sequence

import click

from builder.cli.accept import accept_new
from builder.cli.matrix import cells_of, plan_cell, reports_of, table_of
from builder.cli.options import Aim, aimed, aimed_at_sandbox, json_option, plan_of, start
from builder.flow import history
from builder.planning import matrix, recipe, stack
from builder.planning.matrix import Cell
from builder.planning.plan import Plan
from builder.planning.settings import Settings
from builder.planning.stack import Arch
from builder.proof import record, why
from builder.proof.record import Record
from gracefarm import extras
from gracefarm.console import Console
from gracefarm.errors import ConfigError, GracefarmError, SeveralError, UsageError


@click.command("build")
@click.argument("names", nargs=-1)
@aimed
@click.option("--changed", is_flag=True, help="Every recipe whose plan has no successful build yet.")
@click.option("--matrix", "selector", help="Build each cell of a selector, or of the one that matrix.toml has by that name.")
@click.option("--jobs", type=click.IntRange(1), help="Upper bound of parallel compilations; default: from cores and memory.")
@click.option(
    "--publish", "url", metavar="URL", help="Upload to this legacy upload API; TWINE_USERNAME, TWINE_PASSWORD or keyring."
)
@click.option("--keep", is_flag=True, help="Keep the working folder of a success too.")
@click.option("--no-compiler-cache", is_flag=True, help="Compile everything anew.")
@click.option(
    "--accept-new", "accepts", is_flag=True, help="Read digests that are not known at first use, and write them down."
)
@click.option("--yes", is_flag=True, help="With --accept-new: do not ask.")
@json_option
def build_command(
    names: tuple[str, ...],
    aim: Aim,
    changed: bool,
    selector: str | None,
    jobs: int | None,
    url: str | None,
    keep: bool,
    no_compiler_cache: bool,
    accepts: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Build wheels: fetch, compile in a sandbox, audit, smoke-test, record, publish.

    \b
    builder build causal_conv1d
    builder build causal_conv1d --target x86_64 --jobs 2 --keep
    builder build --changed --publish http://127.0.0.1:8080/legacy/
    builder build causal_conv1d --toolchain host
    builder build causal_conv1d --toolchain host --environment /usr/bin/python3 --cuda /usr/local/cuda
    builder build flash_attn --toolchain container
    builder build triton --accept-new
    builder build causal_conv1d --matrix 'python=3.11,3.13 target=aarch64,x86_64 sm=90+100'
    """
    settings, console = start(as_json=as_json)
    known = recipe.names(settings.project / "recipes")
    if selector is None and bool(names) == changed:
        raise UsageError("name the recipes to build, or say --changed", remedy=f"recipes: {', '.join(known)}")
    _refuse_credentials(url)
    if accepts:
        accept_new(() if selector else names, aim, settings, console, yes=yes)
    asked: Sequence[str | Cell] = names or known
    if selector is not None:
        asked = _cells(names, selector, aim, settings)
    failures: list[GracefarmError] = []
    plans: list[Plan] = []
    for entry in asked:
        try:
            plans += _planned(entry, aim, changed, url, settings, console)
        except GracefarmError as error:
            _survive(error, failures, asked, console)
    if changed:
        console.step("plan", f"changed since the last success: {', '.join(plan.recipe.key for plan in plans) or 'nothing'}")
    for plan in _longest_first(plans, settings):
        try:
            built = build_one(plan, jobs, url, keep, not no_compiler_cache, settings, console)
        except GracefarmError as error:
            _survive(error, failures, plans, console)
        else:
            wheel = record.wheel_path(settings, built)
            console.result(built.model_dump(mode="json") | {"path": str(wheel)}, str(wheel))
    _conclude(asked, failures, aim, settings, console)


def _refuse_credentials(url: str | None) -> None:
    """Before anything prints the URL."""
    if url:
        from builder.proof import publish

        publish.refuse_credentials(url)


def _conclude(
    asked: Sequence[str | Cell], failures: Sequence[GracefarmError], aim: Aim, settings: Settings, console: Console
) -> None:
    """Show what became of each cell of a matrix.

    Raises:
        SeveralError: something failed.
    """
    cells = [entry for entry in asked if isinstance(entry, Cell)]
    for line in table_of(reports_of(cells, settings, aim.on)) if cells else ():
        console.step("matrix", line)
    if failures:
        what = "cells" if cells else "recipes"
        raise SeveralError(f"{len(failures)} of {len(asked)} {what} failed; each is described above")


def _cells(names: Sequence[str], selector: str, aim: Aim, settings: Settings) -> list[Cell]:
    """The cells of a selector.

    Raises:
        UsageError: the selector, or options that name the same in another way.
    """
    target = click.get_current_context().get_parameter_source("target") is click.core.ParameterSource.COMMANDLINE
    given = {
        "--stack": aim.stack,
        "--python": aim.on.interpreter,
        "--sm": aim.on.sm,
        "--target": aim.target if target else None,
    }
    for option, value in given.items():
        if value is not None:
            raise UsageError(
                f"{option} and --matrix both choose cells", remedy=f"write the axis {option[2:]} into the selector"
            )
    return cells_of(matrix.named(selector, settings.project), names, settings)


def _longest_first(plans: list[Plan], settings: Settings) -> list[Plan]:
    """What took longest the last time starts first, and what no record knows before it: that may take long as well."""
    if len(plans) < 2:
        return plans
    records = record.all_of(settings)

    def took(plan: Plan) -> float:
        seconds = why.last_seconds(records, plan.recipe.key, history.like(plan))
        return float("inf") if seconds is None else seconds

    return sorted(plans, key=took, reverse=True)


def _survive(error: GracefarmError, failures: list[GracefarmError], asked: Sequence[object], console: Console) -> None:
    """Say what failed and go on: one broken recipe or build does not end the others'. An only one is the command's own."""
    if len(asked) == 1 and not failures:
        raise error
    console.error(error)
    failures.append(error)


def _planned(name: str | Cell, aim: Aim, changed: bool, url: str | None, settings: Settings, console: Console) -> list[Plan]:
    """The plan; with `changed`, none where nothing is to be built: a night for x86_64 passes over what is aarch64's alone."""
    if isinstance(name, Cell):
        try:
            plan = plan_cell(name, settings, aim.on)
        except ConfigError as error:
            if not changed:
                raise
            console.warn(f"left out: {name.recipe} on {name.stack}: {error.cause}")
            return []
        return [plan] if not changed or (not _settled(plan, url, settings) and _complete(plan, console)) else []
    if changed:
        loaded = recipe.load(settings.project / "recipes", name)
        base = stack.load(settings.project / "stacks", aim.stack or loaded.data.stack)
        if Arch(aim.target) not in base.data.glibc:
            console.warn(f"left out: {name}: stack {base.data.name} has no target {aim.target}")
            return []
    plan = plan_of(name, aim.stack, aim.target, settings, aim.on)
    return [plan] if not changed or (not _settled(plan, url, settings) and _complete(plan, console)) else []


def _complete(plan: Plan, console: Console) -> bool:
    """Every digest is known; a night does not fail for a recipe that waits for one."""
    try:
        plan.require_digests()
    except ConfigError as error:
        console.warn(f"left out: {error.cause} (`{error.repeat}`)")
        return False
    return True


def _settled(plan: Plan, url: str | None, settings: Settings) -> bool:
    """The wheel was built, judged by today's gates and, if a URL is given, published there: a failed upload is made good."""
    last = record.settled(plan, settings)
    return last is not None and (url is None or url in [publication.url for publication in last.published])


def build_one(
    plan: Plan,
    jobs: int | None,
    url: str | None,
    keep: bool,
    compiler_cache: bool,
    settings: Settings,
    console: Console,
) -> Record:
    """Build what is not built, and publish it if a URL is given; an existing build is found without loading the flow."""
    last = record.settled(plan, settings)
    if last is not None and not url:
        console.step("done", f"{plan.title}: built already, build id {plan.build_id[:16]}; nothing to build")
        return last
    from builder.flow import build
    from builder.flow.attempt import BuildOptions

    return build.build(plan, BuildOptions(jobs=jobs, publish=url, keep=keep, compiler_cache=compiler_cache), settings, console)


@click.command("run")
@click.argument("name", default="causal_conv1d")
@aimed_at_sandbox
@json_option
def run_command(name: str, stack_name: str | None, target: str, as_json: bool) -> None:
    """The main job: build NAME, publish it to an index on this machine, install it back with pip, import it."""
    from builder.flow import run

    extras.require("index")
    settings, console = start(as_json=as_json)
    result = run.run(plan_of(name, stack_name, target, settings), settings, console)
    console.result(result.__dict__, f"wheel   {result.wheel}\nrecord  {result.record}\nlog     {result.log}")
