"""`builder matrix`: the cells of a selector, and the state of each."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import click

from builder.cli.options import publish_option, stack_of, start
from builder.flow import publishing
from builder.flow.costs import Costs
from builder.flow.matrix import CellReport, document, report
from builder.ground.interpreters import catalogue
from builder.planning import matrix, recipe, stack
from builder.planning.matrix import Cell, Known
from builder.planning.plan import Plan
from builder.planning.settings import Settings
from builder.proof import record
from builder.toolchains.choice import ToolchainChoice
from builder.upkeep import prune
from gracefarm.cli import json_option
from gracefarm.console import Console
from gracefarm.errors import ConfigError, UsageError


@dataclass(frozen=True, kw_only=True)
class Part:
    """Options that select cells of a selector."""

    only: str | None = None
    shard: str | None = None


def parted(function: Callable[..., None]) -> Callable[..., None]:
    """--only and --shard, given to the command as `part`."""

    @functools.wraps(function)
    def with_part(*arguments: object, only: str | None, shard: str | None, **options: object) -> None:
        function(*arguments, part=Part(only=only, shard=shard), **options)

    with_only = click.option("--only", metavar="AXES", help="Use only the cells with these values, such as stack=cu132.")
    with_shard = click.option(
        "--shard",
        metavar="I/N",
        help="Divide the cells into N parts, and use only part number I. 2/3 is the second of three parts.",
    )
    return with_only(with_shard(with_part))


@click.command("matrix")
@click.argument("names", nargs=-1)
@click.option(
    "--matrix",
    "selector",
    default="default",
    show_default=True,
    metavar="SELECTOR",
    help="List the cells of this selector. SELECTOR is AXIS=VALUES (see above), or a name in matrix.toml.",
)
@parted
@publish_option(
    help="Also send the list to the index with this upload address, such as http://HOST:8080/legacy/. The index shows the "
    "list on a web page.",
)
@click.option(
    "--as", "name", metavar="NAME", help="With --publish: name of the list on the index. Default: the name of the selector."
)
@click.option(
    "--prune",
    "prunes",
    is_flag=True,
    help="Do not list the cells. List the builds on this machine that use an old release of torch. A release is old if it "
    "is not one of the N newest releases in the stacks and builds. keep_torch in matrix.toml sets N. Each line shows "
    "recipe, stack, torch, Python, target and build id. With NAMES, list only builds of these recipes. The command removes "
    "nothing.",
)
@json_option
def matrix_command(names: tuple[str, ...], selector: str, part: Part, url: str | None, name: str | None, prunes: bool) -> None:
    """List the wheels that could be built (the cells), and the state of each.

    A cell is one wheel. A recipe, a stack, a Python, a processor architecture (target) and GPU architectures (sm) determine
    this wheel. A recipe describes how to build one package. A stack pins torch, CUDA, Python and compilers.

    The value of --matrix is a selector: a list of AXIS=VALUES that names the cells. The axes are recipe, stack, torch, cuda,
    python, target and sm. A comma separates values, and 3.11..3.14 is a range. A + joins GPU architectures that one wheel
    supports. NAMES are recipes (folders in recipes/). Without NAMES, the command uses the recipes that the selector names.
    If the selector names no recipes, the command uses all recipes.

    Each line shows the state of a cell, and the CPU seconds and the disk space of its build. If a cell is not built yet, the
    command estimates both values from another build of the recipe. The states are:

    \b
    built      the wheel exists on this machine
    served     the wheel for another Python also works for this cell (abi3)
    running    a build of the cell is running on this machine
    failed     the last build failed or was interrupted
    blocked    the cell cannot be built now; the line ends with the reason
    not tried  no build was started yet; the line names the hosts to download from

    \b
    # List the cells of the selector `default` for one recipe.
    builder matrix causal_conv1d
    # List the cells for four Pythons and two GPU architectures.
    builder matrix causal_conv1d --matrix 'python=3.11..3.14 sm=90+100'
    # List the aarch64 cells with the stack cu132.
    builder matrix --only 'stack=cu132 target=aarch64'
    # Send the list to an index.
    builder matrix --publish http://127.0.0.1:8080/legacy/
    """
    settings, console = start()
    if prunes:
        _show_old(names, settings, console)
        return
    text = matrix.named(selector, settings.project)
    reports = reports_of(cells_of(text, names, settings, part), settings)
    content = document(name or (selector if "=" not in selector else "selected"), text, reports)
    if url is not None:
        publishing.publish_matrix(content, url)
        console.step("publish", f"list of {len(reports)} cells to {url}")
    console.result(content, "\n".join(table_of(reports)))


def reports_of(cells: Sequence[Cell], settings: Settings, on: ToolchainChoice | None = None) -> list[CellReport]:
    """The state of each cell; `on`: as in `plan_cell`."""

    def plan(cell: Cell) -> Plan:
        return plan_cell(cell, settings, on)

    records = record.all_of(settings)
    reports = []
    for cell in cells:
        try:
            base = stack_of(cell.stack, cell.interpreter, settings)
        except ConfigError:  # in its interpreter.toml; the plan reports it again
            base = stack_of(cell.stack, None, settings)
        data = recipe.load(settings.project / "recipes", cell.recipe).data
        reports.append(report(cell, data, base, plan, settings, records))
    return reports


def table_of(reports: Sequence[CellReport]) -> list[str]:
    """One line per cell, and the counts."""
    rows = []
    widths = [max((len(getattr(entry.cell, name)) for entry in reports), default=0) for name in ("recipe", "stack")]
    for entry in reports:
        cell = entry.cell
        python, sm = cell.interpreter or matrix.ROOT, "+".join(cell.sm or entry.stack.data.sm)
        names = f"{cell.recipe:{widths[0]}} {cell.stack:{widths[1]}}"
        row = f"{entry.state:9}  {names} {python:12} {cell.target:8} {sm:8} "
        rows.append((row + ", ".join(filter(None, (_costs(entry.costs), entry.reason)))).rstrip())
    counts = Counter(entry.state for entry in reports)
    return [*rows, ", ".join(f"{count} {state}" for state, count in sorted(counts.items())) or "no cells"]


def _costs(costs: Costs) -> str:
    cpu = f"{costs.cpu_seconds:,.0f} CPU s" if costs.cpu_seconds is not None else ""
    disk = f"{costs.disk_bytes / 1e6:,.0f} MB" if costs.disk_bytes is not None else ""
    return ", ".join(filter(None, (cpu, disk))) + (f" ({costs.estimate})" if costs.estimate else "")


def cells_of(text: str, names: Sequence[str], settings: Settings, part: Part) -> list[Cell]:
    """The cells of a selector in this project, or a part of them; `names`: the requested recipes.

    Raises:
        UsageError: see `builder.planning.matrix.expand`.
        ConfigError: a recipe or stack is unknown or does not match its schema.
    """
    folder = settings.project / "recipes"
    loaded = [recipe.load(folder, name) for name in names or recipe.of_wheels(folder)]
    stacks = {name: stack.load(settings.project / "stacks", name).data for name in stack.names(settings.project / "stacks")}
    known = Known(
        # A recipe that was not requested may be broken: the selector knows its name, and its cells are skipped.
        recipes=dict.fromkeys(recipe.of_wheels(folder), "") | {entry.key: entry.data.stack for entry in loaded},
        stacks=stacks,
        interpreters=catalogue.names(settings.project / "interpreters"),
    )
    cells = matrix.expand(text, known, [entry.key for entry in loaded] if names else ())
    if part.only is not None:
        cells = matrix.only(cells, part.only, known)
    return matrix.shard(cells, part.shard) if part.shard is not None else cells


def plan_cell(cell: Cell, settings: Settings, on: ToolchainChoice | None = None) -> Plan:
    """The plan of a cell in the sandbox; `on`: other choices of the command line, such as PTX.

    Raises:
        ConfigError: the cell is blocked; the message gives the reason.
    """
    choice = replace(on or ToolchainChoice(), interpreter=cell.interpreter, sm=cell.sm)
    if not choice.type.pinned:
        raise UsageError(
            "--matrix supports only the sandbox toolchain",
            remedy="omit --toolchain, or build a single recipe without --matrix",
        )
    loaded = recipe.load(settings.project / "recipes", cell.recipe)
    return choice.plan(loaded, stack_of(cell.stack, cell.interpreter, settings), cell.target)


def _show_old(names: Sequence[str], settings: Settings, console: Console) -> None:
    """List the builds for old releases of torch; `names`: only builds of these recipes.

    Raises:
        UsageError: the command has an option that selects cells or sends them.
        ConfigError: a recipe is unknown.
    """
    given = click.get_current_context().get_parameter_source
    options = {"selector": "--matrix", "only": "--only", "shard": "--shard", "url": "--publish", "name": "--as"}
    for parameter, option in options.items():
        if given(parameter) is click.core.ParameterSource.COMMANDLINE:
            raise UsageError(
                f"--prune and {option} cannot be used together",
                remedy=f"omit {option}; to list only builds of some recipes, give the names of the recipes",
            )
    keys = {recipe.load(settings.project / "recipes", name).key for name in names}
    builds = [build for build in prune.old(settings) if not names or build.recipe in keys]
    widths = [max((len(getattr(build, name)) for build in builds), default=0) for name in ("recipe", "stack")]
    lines = [
        f"{build.recipe:{widths[0]}} {build.stack:{widths[1]}} torch {build.torch:8} {build.python:12} {build.target:8} "
        f"{build.build_id[:16]}"
        for build in builds
    ]
    console.result([asdict(build) for build in builds], "\n".join(lines) or "no builds for old releases of torch")
