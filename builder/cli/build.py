"""`builder build` and `builder run`: recipes to wheels."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import click

from builder.cli.accept import accept_new, accept_option, yes_option
from builder.cli.matrix import Part, cells_of, parted, plan_cell, reports_of, table_of
from builder.cli.options import Aim, aimed, aimed_at_sandbox, jobs_option, plan_of, publish_option, start
from builder.farm.cluster import Cluster, connected
from builder.flow import history, room
from builder.flow.attempt import BuildOptions, Until
from builder.flow.matrix import served_by, serving
from builder.planning import matrix, recipe, stack
from builder.planning.gaps import Gap
from builder.planning.matrix import Cell
from builder.planning.plan import Caches, Plan
from builder.planning.settings import Settings
from builder.planning.stack import Arch, LoadedStack
from builder.proof import record, why
from builder.proof.record import Record
from builder.proof.shared_cache import MODES, Mode
from gracefarm import extras
from gracefarm.cli import json_option
from gracefarm.console import Console
from gracefarm.errors import ConfigError, DiskFullError, GracefarmError, SeveralError, UsageError


@click.command("build")
@click.argument("names", nargs=-1)
@aimed
@click.option(
    "--changed",
    is_flag=True,
    help="Skip each recipe or cell that was already built successfully with its current sources, options and compilers. "
    "Without --matrix, build all other recipes. With --matrix, build all other cells of the selector.",
)
@click.option(
    "--matrix",
    "selector",
    metavar="SELECTOR",
    help="Build the cells of this selector. SELECTOR is AXIS=VALUES (see above), or a name in matrix.toml.",
)
@parted
@jobs_option
@click.option(
    "--farm",
    "address",
    metavar="ADDRESS",
    help="Build on a Ray cluster. ADDRESS is ray://HOST:10001, HOST:6379, auto (the cluster that this machine belongs to) or "
    "local (a new cluster on this machine).",
)
@publish_option(
    help="Upload each wheel to the index with this upload address, such as http://HOST:8080/legacy/. The environment "
    "variables TWINE_USERNAME and TWINE_PASSWORD, or the program keyring, give the user name and the password. If URL is "
    "empty, the wheels are not uploaded.",
)
@click.option("--keep", is_flag=True, help="Do not delete the working folder after a successful build.")
@click.option("--no-compiler-cache", is_flag=True, help="Do not use the compiler cache (ccache).")
@click.option(
    "--shared-cache",
    type=click.Choice(MODES),
    default="read",
    show_default=True,
    help="How to use the cache of compiled code (object files and GPU code) that several machines share. off: do not use "
    "the cache. read: only read from the cache. write: read from the cache and write to it. The setting shared_cache in "
    "settings.toml contains the address of the cache. `builder doctor` prints the path of settings.toml.",
)
@click.option(
    "--until",
    type=click.Choice(["root", "compile"]),
    help="Stop the build before or after the compilation. root: stop before the compilation, and print the folders and "
    "files that the compilation reads, one on each line. compile: stop after the compilation, before the audit and the "
    "tests, and print the folder of the build. The same command without --until continues the build.",
)
@click.option(
    "--no-device-store",
    is_flag=True,
    help="Compile all GPU code again. Without this option, a build reuses GPU code that earlier builds of the recipe have "
    "compiled.",
)
@accept_option
@yes_option
@json_option
def build_command(
    names: tuple[str, ...],
    aim: Aim,
    changed: bool,
    selector: str | None,
    part: Part,
    jobs: int | None,
    address: str | None,
    url: str | None,
    keep: bool,
    no_compiler_cache: bool,
    shared_cache: Mode,
    until: Until | None,
    no_device_store: bool,
    accepts: bool,
    yes: bool,
) -> None:
    """Build wheels from recipes, test them, and publish them.

    NAMES are recipes (folders in recipes/). A recipe describes how to build one package. To select recipes in a different
    way, use --changed or --matrix. The steps for each wheel are: fetch the sources, compile them in a sandbox without
    network, check the files of the wheel (audit), and import the wheel in a new environment (smoke test). With --publish,
    the command also uploads the wheel. If a wheel was already built from the same sources, options and compilers, the
    command does not build it again.

    With --matrix, the command can build several wheels from one recipe, for example one wheel for each Python. Each of these
    wheels is a cell. The value of --matrix is a selector: a list of AXIS=VALUES that names the cells. The axes are recipe,
    stack, torch, cuda, python, target (processor architecture) and sm (GPU architectures). A comma separates values. A +
    joins GPU architectures that one wheel supports.

    \b
    # Build the wheel of one recipe.
    builder build causal_conv1d
    # Build for x86_64 with two compilations at a time. Keep the working folder.
    builder build causal_conv1d --target x86_64 --jobs 2 --keep
    # Build each recipe that has changed, and upload the wheels.
    builder build --changed --publish http://127.0.0.1:8080/legacy/
    # Build with gcc of this machine and with the CUDA in /usr/local/cuda.
    builder build causal_conv1d --toolchain host --cuda /usr/local/cuda
    # Build in a container.
    builder build flash_attn --toolchain container
    # Ask whether to accept the files whose digest is unknown, then build.
    builder build triton --accept-new
    # Build a wheel for Python 3.11 and a wheel for Python 3.13. Both wheels
    # support two GPU architectures.
    builder build causal_conv1d --matrix 'python=3.11,3.13 sm=90+100'
    # Build the changed cells of the selector `default` on a Ray cluster.
    builder build --changed --matrix default --farm ray://head:10001
    """
    settings, console = start()
    asked = _asked(names, selector, part, aim, settings, changed=changed)
    _refuse_together(url, address, until, accepts=accepts, changed=changed, twin=aim.on.twin)
    if accepts:
        accept_new(_lacking(asked, aim, settings), settings, console, yes=yes)
    caches = Caches(compiler=not no_compiler_cache, device=not no_device_store)
    options = BuildOptions(jobs=jobs, publish=url, keep=keep, caches=caches, shared_cache=shared_cache, until=until)
    with _farm(address, aim, console) as cluster:
        aim = aim if cluster is None else replace(aim, on=replace(aim.on, hosts=cluster.hosts))
        failures = build_all(asked, aim, changed, options, cluster, settings, console)
    _conclude(asked, failures, aim, settings, console)


def build_all(
    asked: Sequence[str | Cell],
    aim: Aim,
    changed: bool,
    options: BuildOptions,
    cluster: Cluster | None,
    settings: Settings,
    console: Console,
) -> list[GracefarmError]:
    """Plan and build what was asked for; what failed. If this machine has too little space, all cells of a matrix fail.

    Raises:
        DiskFullError: this machine has too little space for the builds of recipes.
    """
    failures: list[GracefarmError] = []
    plans, by_id = _all_planned(asked, failures, aim, changed, options.publish, settings, console)
    if changed:
        changes = ", ".join(plan.recipe.key for plan in plans) or "nothing"
        console.step("plan", f"changed since the last successful build: {changes}")

    if options.until == "root":
        for plan in plans:
            try:
                _ready(plan, options, settings, console)
            except GracefarmError as error:
                _survive(error, failures, asked, console)
        return failures
    if cluster is None and (full := _too_full(plans, by_id, options, settings, console)):
        return failures + full

    def served(plan: Plan) -> Plan:
        return _server(plan, by_id.get(plan.build_id), aim, settings, console) or plan

    for built in _results(_longest_first(plans, settings), served, options, cluster, settings, console):
        if isinstance(built, GracefarmError):
            _survive(built, failures, asked, console)
        else:
            product = record.product_path(settings, built)
            product = record.folder(settings, built.build_id) if product is None and options.until else product
            console.result(built.model_dump(mode="json") | {"path": str(product)}, str(product))
    return failures


def _too_full(
    plans: Sequence[Plan], cells: Mapping[str, Cell], options: BuildOptions, settings: Settings, console: Console
) -> list[GracefarmError]:
    """The failure of each cell that is not built, if this machine has too little space; `cells`: by build id.

    Raises:
        DiskFullError: this machine has too little space for the builds of recipes.
    """
    try:
        room.require(plans, settings, keep=options.keep)
    except DiskFullError as error:
        if not cells:
            raise
        console.error(error)
        return [error for plan in plans if record.settled(plan, settings) is None]
    return []


def _ready(plan: Plan, options: BuildOptions, settings: Settings, console: Console) -> None:
    """Do everything before the compile, and print what the compile reads."""
    from builder.flow import build

    reads = [str(path) for path in build.ready(plan, options, settings, console)]
    value = {"recipe": plan.recipe.key, "build_id": plan.build_id, "reads": reads}
    console.result(value, "\n".join(reads))


@contextlib.contextmanager
def _farm(address: str | None, aim: Aim, console: Console) -> Iterator[Cluster | None]:
    """The cluster that builds; None: this machine builds.

    Raises:
        UsageError: the toolchain is this machine's own, or trees replace downloads.
        UsageError, HostError, FarmError: see `cluster.connected`.
    """
    if address is None:
        yield None
        return
    if not aim.on.type.pinned:
        raise UsageError(
            "--farm supports only the sandbox toolchain", remedy=f"omit --toolchain {aim.on.kind}, or omit --farm"
        )
    if aim.on.from_source:
        raise UsageError("--farm and --llvm source cannot be used together", remedy="omit --llvm source, or omit --farm")
    console.step("farm", f"connecting to {address}")
    with connected(address) as cluster:
        yield cluster


def _results(
    plans: Sequence[Plan],
    served: Callable[[Plan], Plan],
    options: BuildOptions,
    cluster: Cluster | None,
    settings: Settings,
    console: Console,
) -> Iterator[Record | GracefarmError]:
    """The result of each plan, or of the plan that serves it, as it ends. Without a cluster they are built in turn."""
    if cluster is not None:
        from builder.farm import run

        yield from run.build(plans, served, options, cluster, settings, console)
        return
    for plan in plans:
        try:
            yield build_one(served(plan), options, settings, console)
        except GracefarmError as error:
            yield error


def _asked(
    names: Sequence[str], selector: str | None, part: Part, aim: Aim, settings: Settings, *, changed: bool
) -> Sequence[str | Cell]:
    """The recipes or cells that a command line means.

    Raises:
        UsageError: it means none, or see `_cells`.
    """
    cells = _cells(names, selector, part, aim, settings)
    if cells is not None:
        return cells
    known = recipe.names(settings.project / "recipes")
    if names and changed:
        raise UsageError("names of recipes and --changed cannot be used together", remedy="omit the names, or omit --changed")
    if not names and not changed:
        raise UsageError(
            "no recipe was given", remedy=f"give names of recipes, or --changed; the recipes are: {', '.join(known)}"
        )
    return names or recipe.of_wheels(settings.project / "recipes")


def _lacking(asked: Sequence[str | Cell], aim: Aim, settings: Settings) -> Iterator[tuple[LoadedStack, Sequence[Gap]]]:
    """What each build lacks, with its stack. What cannot be planned is reported where it is built."""
    for entry in asked:
        with contextlib.suppress(GracefarmError):
            if isinstance(entry, Cell):
                plan = plan_cell(entry, settings, aim.on)
            else:
                plan = plan_of(entry, aim.stack, aim.target, settings, aim.on)
            yield plan.stack, plan.gaps


def _refuse_together(
    url: str | None, address: str | None, until: Until | None, *, accepts: bool, changed: bool, twin: bool
) -> None:
    """Refuse options that cannot be used together, and check the URL before anything prints it.

    Raises:
        UsageError: options cannot be used together, or the URL contains credentials.
    """
    if url:
        from builder.proof import publish

        publish.refuse_credentials(url)
    if twin and url:
        raise UsageError("--twin and --publish cannot be used together", remedy="omit one of the two options")
    if until is not None and (url or address):
        raise UsageError(f"--until and --{'publish' if url else 'farm'} cannot be used together", remedy="omit one option")
    if accepts and changed:
        raise UsageError("--accept-new and --changed cannot be used together", remedy="replace --changed by names of recipes")


def _conclude(
    asked: Sequence[str | Cell], failures: Sequence[GracefarmError], aim: Aim, settings: Settings, console: Console
) -> None:
    """Show the result of each cell of a matrix.

    Raises:
        SeveralError: a build failed.
    """
    cells = [entry for entry in asked if isinstance(entry, Cell)]
    for line in table_of(reports_of(cells, settings, aim.on)) if cells else ():
        console.step("matrix", line)
    if failures:
        what = "cells" if cells else "recipes"
        raise SeveralError(
            f"{len(failures)} of {len(asked)} {what} failed; see the errors above",
            remedy="fix these errors, then repeat the command; finished builds are kept",
        )


def _cells(names: Sequence[str], selector: str | None, part: Part, aim: Aim, settings: Settings) -> list[Cell] | None:
    """The cells of a selector; None: there is no selector.

    Raises:
        UsageError: the selector is invalid, or an option sets an axis of the selector.
    """
    if selector is None:
        if part != Part():
            raise UsageError("--only and --shard require --matrix", remedy="add a selector, such as --matrix default")
        return None
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
                f"{option} and --matrix cannot be used together",
                remedy=f"omit {option}, and add the axis {option[2:]} to the selector",
            )
    return cells_of(matrix.named(selector, settings.project), names, settings, part)


def _server(plan: Plan, cell: Cell | None, aim: Aim, settings: Settings, console: Console) -> Plan | None:
    """The plan of another Python's build whose abi3 wheel is this cell's too; None: the cell needs a build."""
    if cell is None or record.existing(plan, settings) is not None:
        return None
    again = functools.partial(plan_cell, settings=settings, on=aim.on)
    built = serving(cell, plan.stack.python, again, settings, record.all_of(settings, cell.recipe))
    if built is None:
        return None
    console.step("done", served_by(built, plan))
    return again(replace(cell, interpreter=built.interpreter))


def _longest_first(plans: list[Plan], settings: Settings) -> list[Plan]:
    """Sort by the duration of the last build, longest first. Recipes without a record come first, since they may take long.

    Cells that differ only in Python are sorted by Python, since an abi3 wheel serves its Python and later ones.
    """
    if len(plans) < 2:
        return plans
    records = record.all_of(settings)

    def took(plan: Plan) -> float:
        seconds = why.last_seconds(records, plan.recipe.key, history.like(plan))
        return float("inf") if seconds is None else seconds

    oldest_first = sorted(plans, key=lambda plan: int(plan.stack.python.rstrip("t").partition(".")[2]))
    return sorted(oldest_first, key=took, reverse=True)


def _survive(error: GracefarmError, failures: list[GracefarmError], asked: Sequence[str | Cell], console: Console) -> None:
    """Print the error and continue, so that one failure does not stop the others. The error of a single recipe is raised."""
    if len(asked) == 1 and isinstance(asked[0], str):
        raise error
    console.error(error)
    failures.append(error)


def _all_planned(
    asked: Sequence[str | Cell],
    failures: list[GracefarmError],
    aim: Aim,
    changed: bool,
    url: str | None,
    settings: Settings,
    console: Console,
) -> tuple[list[Plan], dict[str, Cell]]:
    """The plans of what is asked for, and the cells among it by build id; what cannot be planned is a failure."""
    plans: list[Plan] = []
    cells: dict[str, Cell] = {}
    for entry in asked:
        try:
            cell_plans = planned(entry, aim, changed, url, settings, console)
            cells |= {plan.build_id: entry for plan in cell_plans if isinstance(entry, Cell)}
        except GracefarmError as error:
            _survive(error, failures, asked, console)
        else:
            plans += cell_plans
    return plans, cells


def planned(name: str | Cell, aim: Aim, changed: bool, url: str | None, settings: Settings, console: Console) -> list[Plan]:
    """The plan; with `changed`, none if there is nothing to build: a run for x86_64 skips stacks that support only aarch64."""
    if isinstance(name, Cell):
        try:
            plan = plan_cell(name, settings, aim.on)
            if changed and (served := _server(plan, name, aim, settings, console)) is not None:
                plan = served
            wanted = not changed or (not _settled(plan, url, settings) and _complete(plan, console))
        except ConfigError as error:  # the build id reads the locks, so a missing lock is found after `plan_cell`
            if not changed:
                raise
            console.warn(f"skipped: {name.recipe} on {name.stack}: {error.cause}")
            return []
        return [plan] if wanted else []
    if changed:
        loaded = recipe.load(settings.project / "recipes", name)
        base = stack.load(settings.project / "stacks", aim.stack or loaded.data.stack)
        if Arch(aim.target) not in base.data.glibc:
            console.warn(f"skipped: {name}: stack {base.data.name} has no target {aim.target}")
            return []
    plan = plan_of(name, aim.stack, aim.target, settings, aim.on)
    return [plan] if not changed or (not _settled(plan, url, settings) and _complete(plan, console)) else []


def _complete(plan: Plan, console: Console) -> bool:
    """Whether every digest is known. A nightly run skips recipes with unknown digests instead of failing."""
    try:
        plan.require_digests()
    except ConfigError as error:
        console.warn(f"skipped: {error.cause} (`{error.repeat}`)")
        return False
    return True


def _settled(plan: Plan, url: str | None, settings: Settings) -> bool:
    """Whether the wheel is built, judged by the current gates and, if a URL is given, published there."""
    last = record.settled(plan, settings)
    return last is not None and (url is None or url in [publication.url for publication in last.published])


def build_one(plan: Plan, options: BuildOptions, settings: Settings, console: Console) -> Record:
    """Build unless it is built already, and publish if a URL is given. An existing build does not import the flow."""
    last = record.settled(plan, settings)
    if last is not None and not options.publish:
        console.step("done", f"{plan.title}: already built, build id {plan.build_id[:16]}")
        return last
    from builder.flow import build

    return build.build(plan, options, settings, console)


@click.command("run")
@click.argument("name", default="causal_conv1d")
@aimed_at_sandbox
@json_option
def run_command(name: str, stack_name: str | None, target: str) -> None:
    """Build one wheel, publish it on this machine, install it with pip, and import it.

    NAME is a recipe (a folder in recipes/). A recipe describes how to build one package. The default of NAME is
    causal_conv1d. The command starts an index on this machine, uploads the wheel to this index, and installs the wheel from
    the index into a new environment. At the end it stops the index, and prints the paths of the wheel, the record and the
    log.

    \b
    # Run all these steps for causal_conv1d and aarch64.
    builder run
    # Run all these steps for x86_64.
    builder run causal_conv1d --target x86_64
    """
    from builder.flow import run

    extras.require("index")
    settings, console = start()
    result = run.run(plan_of(name, stack_name, target, settings), settings, console)
    console.result(result.__dict__, f"wheel   {result.wheel}\nrecord  {result.record}\nlog     {result.log}")
