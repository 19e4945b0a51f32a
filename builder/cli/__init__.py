"""`builder`: the command line. Parses, calls, prints; nothing else.

What takes long to import is imported by the commands that need it: an existing build is found in less time than httpx loads.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from builder import schema, smoke
from builder.box import meter, sandbox
from builder.cli.key import key as key_command
from builder.cli.key import sign as sign_command
from builder.cli.lock import lock as lock_command
from builder.cli.options import plan_of, target_here, toolchained, wanted
from builder.cli.sets import set_ as set_command
from builder.cli.verify import verify as verify_command
from builder.cli.why import why as why_command
from builder.compiling import pep517, units
from builder.ground import environment, root, toolkit
from builder.planning import gaps, stack
from builder.planning import plan as planning
from builder.planning import recipe as recipes
from builder.planning.plan import Contained, Plan
from builder.planning.recipe import Recipe
from builder.planning.stack import Arch
from builder.proof import record
from builder.proof import why as explaining
from builder.toolchains import host
from builder.toolchains.host_tools import Wanted, find
from builder.upkeep import clean as cleaning
from gracefarm import console as consoles
from gracefarm import settings as settings_module
from gracefarm.console import Console
from gracefarm.errors import ConfigError, ExitCode, GracefarmError, SeveralError, UsageError
from gracefarm.files import atomic_write, lock, remove_tree
from gracefarm.settings import Settings
from gracefarm.tables import parse_size

if TYPE_CHECKING:
    from builder.audit import Policy

Function = Any  # click's decorators are untyped about what they wrap


def _common(function: Function) -> Function:
    return click.option("--json", "as_json", is_flag=True, help="JSON lines for machines.")(function)


def _aimed(function: Function) -> Function:
    function = click.option("--stack", "stack_name", metavar="NAME", help="Stack to build against; default: the recipe's.")(
        function
    )
    target = click.option(
        "--target",
        type=click.Choice([one.value for one in Arch]),
        default=Arch.AARCH64.value,
        show_default=True,
        help="The wheel's architecture.",
    )
    return target(function)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="gracefarm")
def cli() -> None:
    """Turn a pinned recipe into a proven aarch64 CUDA wheel.

    \b
    builder list
    builder plan causal_conv1d
    builder build causal_conv1d --publish http://127.0.0.1:8080/legacy/
    builder audit some.whl --stack cu130
    """


@cli.command()
@click.argument("names", nargs=-1)
@_aimed
@toolchained
@click.option("--changed", is_flag=True, help="Every recipe whose plan has no successful build yet.")
@click.option("--jobs", type=click.IntRange(1), help="Upper bound of parallel compilations; default: from cores and memory.")
@click.option(
    "--publish", "url", metavar="URL", help="Upload to this legacy upload API; TWINE_USERNAME, TWINE_PASSWORD or keyring."
)
@click.option("--keep", is_flag=True, help="Keep the working folder of a success too.")
@click.option("--no-compiler-cache", is_flag=True, help="Compile everything anew.")
@_common
@click.pass_context
def build(
    context: click.Context,
    names: tuple[str, ...],
    stack_name: str | None,
    target: str,
    toolchain: str,
    own: Path | None,
    python: Path | None,
    cuda: Path | None,
    changed: bool,
    jobs: int | None,
    url: str | None,
    keep: bool,
    no_compiler_cache: bool,
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
    """
    settings, console = settings_module.load(), Console(as_json=as_json)
    if bool(names) == changed:
        raise UsageError("name the recipes to build, or say --changed", remedy=f"recipes: {', '.join(_all(settings))}")
    if url:
        from builder.proof import publish

        publish.refuse_credentials(url)  # before anything prints it
    on = wanted(toolchain, own, python, cuda)
    target = target_here(context, target, on)
    asked = names or _all(settings)
    failures: list[GracefarmError] = []

    def planned(name: str) -> Plan | None:
        if changed and not _has_target(name, stack_name, target, settings, console):
            return None
        one = plan_of(name, stack_name, target, settings, on)
        return one if not changed or (not _settled(one, url, settings) and _complete(one, console)) else None

    plans = _plans(asked, planned, failures, console)
    if changed:
        console.step("plan", f"changed since the last success: {', '.join(one.recipe.key for one in plans) or 'nothing'}")
    for one in _longest_first(plans, settings):
        try:
            done = _build(one, jobs, url, keep, not no_compiler_cache, settings, console)
        except GracefarmError as error:
            _survive(error, failures, plans, console)
        else:
            wheel = record.wheel_path(settings, done)
            console.result(done.model_dump(mode="json") | {"path": str(wheel)}, str(wheel))
    if failures:
        raise SeveralError(f"{len(failures)} of {len(asked)} recipes failed; each is described above")


def _plans(
    asked: Sequence[str], planned: Callable[[str], Plan | None], failures: list[GracefarmError], console: Console
) -> list[Plan]:
    plans = []
    for name in asked:
        try:
            plans.append(planned(name))
        except GracefarmError as error:
            _survive(error, failures, asked, console)
    return [one for one in plans if one is not None]


def _longest_first(plans: list[Plan], settings: Settings) -> list[Plan]:
    """What took longest the last time starts first, and what no record knows before it: that may take long as well."""
    if len(plans) < 2:
        return plans
    records = record.all_of(settings)

    def took(one: Plan) -> float:
        found = explaining.last_seconds(records, one.recipe.key, one.stack.data.name, one.target.value)
        return float("inf") if found is None else found

    return sorted(plans, key=took, reverse=True)


def _survive(error: GracefarmError, failures: list[GracefarmError], asked: Sequence[object], console: Console) -> None:
    """Say what failed and go on: one broken recipe or build does not end the others'. An only one is the command's own."""
    if len(asked) == 1 and not failures:
        raise error
    console.error(error)
    failures.append(error)


def _has_target(name: str, stack_name: str | None, target: str, settings: Settings, console: Console) -> bool:
    """The recipe's stack builds for the target at all; a night for x86_64 passes over what is for aarch64 alone."""
    loaded = recipes.load(settings.project / "recipes", name)
    base = stack.load(settings.project / "stacks", stack_name or loaded.data.stack)
    if Arch(target) in base.data.glibc:
        return True
    console.warn(f"left out: {name}: stack {base.data.name} has no target {target}")
    return False


def _complete(one: Plan, console: Console) -> bool:
    """Every digest is known; a night does not fail for a recipe that waits for one."""
    try:
        gaps.require_none(one)
    except ConfigError as error:
        console.warn(f"left out: {error.cause} (`{error.repeat}`)")
        return False
    return True


def _settled(one: Plan, url: str | None, settings: Settings) -> bool:
    """The wheel was built, judged by today's gates and, if a URL is given, published there: a failed upload is made good."""
    found = record.settled(one, settings)
    return found is not None and (url is None or url in [publication.url for publication in found.published])


def _build(
    one: Plan,
    jobs: int | None,
    url: str | None,
    keep: bool,
    compiler_cache: bool,
    settings: Settings,
    console: Console,
) -> record.Record:
    found = record.settled(one, settings)
    if found is not None and not url:
        console.step("done", f"{one.title}: built already, build id {one.build_id[:16]}; nothing to build")
        return found
    from builder.flow import build as flow

    return flow.build(one, flow.Options(jobs=jobs, publish=url, keep=keep, compiler_cache=compiler_cache), settings, console)


def _all(settings: Settings) -> list[str]:
    return recipes.names(settings.project / "recipes")


@cli.command("list")
@_common
def list_(as_json: bool) -> None:
    """Recipes, and the last build of each on this machine."""
    settings, console = settings_module.load(), Console(as_json=as_json)
    rows, lines = [], []
    for key in _all(settings):
        try:
            data = recipes.load(settings.project / "recipes", key).data
        except ConfigError as error:
            rows.append({"recipe": key, "error": error.cause})
            lines.append(f"{key:20} {error.cause}")
            continue
        last = next(iter(record.all_of(settings, key)), None)
        outcome = last.outcome if last else None
        rows.append(data.model_dump(include={"name", "version", "stack", "summary"}) | {"recipe": key, "last": outcome})
        lines.append(f"{key:20} {data.version:12} {data.stack:8} {outcome or '-':8} {data.summary}")
    console.result(rows, "\n".join(lines) or "no recipes")


@cli.command()
@click.argument("name")
@_aimed
@toolchained
@_common
@click.pass_context
def plan(
    context: click.Context,
    name: str,
    stack_name: str | None,
    target: str,
    toolchain: str,
    own: Path | None,
    python: Path | None,
    cuda: Path | None,
    as_json: bool,
) -> None:
    """Inputs, build id, steps and commands of a build, and whether its result exists.

    \b
    builder plan causal_conv1d --json
    builder plan causal_conv1d --toolchain host
    """
    from builder.flow import build as flow

    settings, console = settings_module.load(), Console(as_json=as_json)
    on = wanted(toolchain, own, python, cuda)
    made = plan_of(name, stack_name, target_here(context, target, on), settings, on)
    found = record.existing(made, settings)
    missing = gaps.of_plan(made)
    work = record.folder(settings, made.build_id) / "work"
    command = flow.build_command(made, settings, work)
    value = {
        "build_id": made.build_id,
        "title": made.title,
        "inputs": made.inputs,
        "steps": planning.STEPS,
        "command": command,
        "gaps": [{"what": one.what, "url": one.url, "reason": one.reason} for one in missing],
        "exists": found is not None,
        "wheel": str(record.wheel_path(settings, found)) if found else None,
    }
    text = f"{made.title}\nbuild id  {made.build_id}\n\n{json.dumps(made.inputs, indent=2)}\n\n"
    text += f"steps     {' > '.join(planning.STEPS)}\ncommand   {' '.join(command)}\n"
    text += "".join(f"no digest {one.what}  {one.url}: {one.reason}\n" for one in missing)
    console.result(value, text + (f"exists    {value['wheel']}" if found else "exists    no; `builder build` makes it"))


@cli.command()
@click.argument("name")
def log(name: str) -> None:
    """The whole log of a recipe's last build."""
    settings = settings_module.load()
    last = record.latest(settings, recipes.load(settings.project / "recipes", name).key)
    path = record.folder(settings, last.build_id) / "log.txt"
    if not path.is_file():
        raise ConfigError(f"the last build of {name} ended before it had a log", remedy=f"`builder show {name}` says why")
    # `builder log NAME | head`: who reads may stop before the end.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    with path.open("rb") as stream:
        shutil.copyfileobj(stream, sys.stdout.buffer)


@cli.command()
@click.argument("name")
@_common
def show(name: str, as_json: bool) -> None:
    """The record of a recipe's last build: outcome, stages, verdicts."""
    settings, console = settings_module.load(), Console(as_json=as_json)
    last = record.latest(settings, recipes.load(settings.project / "recipes", name).key)
    wheel = record.wheel_path(settings, last)
    lines = [f"{last.name} {last.version}, stack {last.stack}: {last.outcome}, {last.finished}", f"build id  {last.build_id}"]
    if last.failure:
        lines += [f"cause     {last.failure.cause}", f"remedy    {last.failure.remedy}"]
    if last.jobs:
        lines.append(f"jobs      {last.jobs.count}: {last.jobs.reason}")
    if last.compiler_cache:
        lines.append(units.title(last.compiler_cache))
    for one in last.stages:
        peak = f", peak {one.peak_memory / 2**30:.2f} GiB" if one.peak_memory is not None else ""
        lines.append(f"{one.name:9} {one.wall_s:.1f} s" + (f", {one.cpu_s:.1f} CPU s" if one.cpu_s is not None else "") + peak)
    lines += [f"gate      {one.status:14} {one.gate}: {one.summary}" for one in last.verdicts]
    lines += [f"gpu       {smoke.sentence(last.gpu)}"] if last.gpu else []
    lines += [f"wheel     {wheel}"] if wheel else []
    lines += [f"record    {record.path(settings, last.build_id)}"]
    console.result(last.model_dump(mode="json"), "\n".join(lines))


@cli.command("doctor")
@click.option("--fix", is_flag=True, help="Mend what can be mended, as root or with sudo.")
@_common
def doctor_(fix: bool, as_json: bool) -> None:
    """What this machine lacks for building, and how to mend it."""
    from builder.upkeep import doctor

    settings, console = settings_module.load(), Console(as_json=as_json)
    found = doctor.checks(settings)
    if fix:
        doctor.fix(found, settings)
        found = doctor.checks(settings)
    rows = [{"name": one.name, "ok": one.ok, "found": one.found, "remedy": one.remedy} for one in found]
    lines = [
        f"{'ok ' if one.ok else 'NO '} {one.name:22} {one.found}" + ("" if one.ok else f"\n      {one.remedy}")
        for one in found
    ]
    console.result(rows, "\n".join(lines))
    if not all(one.ok for one in found):
        sys.exit(ExitCode.HOST)


@cli.command()
@click.option("--all", "everything", is_flag=True, help="Roots, environments, stores and finished builds as well.")
@_common
def clean(everything: bool, as_json: bool) -> None:
    """Remove working folders of builds; wheels, records, logs and caches stay, unless --all."""
    settings, console = settings_module.load(), Console(as_json=as_json)
    before = shutil.disk_usage(settings.home).free if settings.home.is_dir() else 0
    clear = cleaning.everything if everything else cleaning.working_folders
    clear(settings, lambda: console.step("wait", "a build is running; waiting"))
    freed = (shutil.disk_usage(settings.home).free - before) if settings.home.is_dir() else 0
    console.result({"freed": max(freed, 0)}, f"freed {max(freed, 0) / 1e6:.0f} MB")


@cli.command()
@click.argument("name")
def shell(name: str) -> None:
    """A shell inside the sandbox of NAME's last build, failed or not; /build is its working folder."""
    from builder.flow import build as flow

    settings, console = settings_module.load(), Console()
    last = record.latest(settings, recipes.load(settings.project / "recipes", name).key)
    folder = record.folder(settings, last.build_id) / "work"
    if last.toolchain != "sandbox":
        where = (
            "had this machine's own tools and no sandbox" if last.toolchain == "host" else "ran in a container, which is gone"
        )
        raise ConfigError(f"the last build of {name} {where}", remedy=f"look around in {folder}")
    made = plan_of(name, last.stack, str(last.inputs["target"]), settings)
    if made.build_id != last.build_id:
        console.warn(f"changed since that build (`builder why {name}`): files are that build's, tools and variables today's")
    with lock(
        settings.home / "locks" / f"build-{last.build_id}", lambda: console.step("wait", "this build is running; waiting")
    ):
        box = flow.reopen(made, folder, settings, console)
        console.step("shell", f"the build's command was: {' '.join(pep517.command(made))}")
        code = sandbox.shell(box)
    sys.exit(code)


@cli.command()
@click.argument("wheel", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--stack", "stack_name", required=True, metavar="NAME", help="Stack whose torch, CUDA and libc it is held against."
)
@click.option("--recipe", "recipe_name", metavar="NAME", help="Ask for what this recipe declares: name, version, files, sm.")
@_common
def audit(wheel: Path, stack_name: str, recipe_name: str | None, as_json: bool) -> None:
    """The gates, on anybody's wheel. Exit code 30 when one refuses it.

    \b
    builder audit dist/thing-1.0-cp311-cp311-manylinux_2_34_aarch64.whl --stack cu130
    builder audit dist/triton-3.2.0+git755d4164-cp311-cp311-manylinux_2_34_aarch64.whl --stack cu124 --recipe triton
    """
    from builder import audit as gates

    settings, console = settings_module.load(), Console(as_json=as_json)
    asked = recipes.load(settings.project / "recipes", recipe_name).data if recipe_name else None
    policy = _foreign_policy(wheel, stack_name, settings, console)
    verdicts = gates.audit(wheel, _asked_by(asked, policy) if asked else policy)
    lines = []
    for one in verdicts:
        lines += [f"{one.status:14} {one.gate}: {one.summary}", *(f"                 {detail}" for detail in one.details[:20])]
    console.result([one.model_dump(mode="json") for one in verdicts], "\n".join(lines))
    gates.require(verdicts)


def _asked_by(recipe: Recipe, policy: Policy) -> Policy:
    """What a recipe declares of its wheel, on top of what the stack asks of anybody's."""
    return replace(
        policy,
        name=recipe.name,
        version=recipe.version,
        sm=policy.sm if recipe.build.cuda else None,
        needs_cubins=recipe.build.cuda,
        sm_extra=recipe.wheel.sm_extra,
        bundled=recipe.wheel.bundled,
        max_size=parse_size(recipe.wheel.max_size),
    )


def _foreign_policy(wheel: Path, stack_name: str, settings: Settings, console: Console) -> Policy:
    from builder import audit as gates

    loaded, target = stack.load(settings.project / "stacks", stack_name), gates.target_of(wheel)
    base = root.ensure(loaded, stack.host_arch(), target, settings)
    site = environment.ensure(loaded, target, base, settings)
    cuda = bool(loaded.data.toolchain.requirements)
    compiler = environment.ensure_toolchain(loaded, stack.host_arch(), settings) if cuda else None
    console.step("audit", f"{wheel.name} against stack {stack_name} for {target.value}")
    return gates.Policy(
        target=target,
        python=loaded.data.python,
        name=None,
        version=None,
        glibc=loaded.data.glibc[target],
        cuda=loaded.data.cuda,
        sm=loaded.data.sm if cuda else None,
        sm_extra={},
        bundled=(),
        max_size=parse_size("4GiB"),
        build_paths=(),
        site_packages=site / "lib" / f"python{loaded.data.python}" / "site-packages",
        root=base,
        cuobjdump=next(iter(sorted(compiler.glob("nvidia/*/bin/cuobjdump"))), None) if compiler else None,
    )


@cli.command("smoke")
@click.argument("wheel", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--stack", "stack_name", required=True, metavar="NAME", help="Stack whose environment it is imported in.")
@click.option("--import", "imports", multiple=True, metavar="MODULE", help="Module to import; repeatable.")
@click.option(
    "--script", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A smoke.py to run after the imports."
)
@click.option("--recipe", "recipe_name", metavar="NAME", help="Take modules and script from this recipe.")
@click.option("--gpu", is_flag=True, help="Run the script (the recipe's smoke_gpu.py) on a GPU; without one, say so.")
@toolchained
@_common
def smoke_(
    wheel: Path,
    stack_name: str,
    imports: tuple[str, ...],
    script: Path | None,
    recipe_name: str | None,
    gpu: bool,
    toolchain: str,
    own: Path | None,
    python: Path | None,
    cuda: Path | None,
    as_json: bool,
) -> None:
    """Import a wheel by name in a fresh environment of the stack, and with --gpu try it on a GPU.

    \b
    builder smoke thing.whl --stack cu130 --import thing --import thing_cuda
    builder smoke causal_conv1d.whl --stack cu130 --recipe causal_conv1d --gpu --toolchain host
    """
    settings, console = settings_module.load(), Console(as_json=as_json)
    if recipe_name is not None:
        loaded = recipes.load(settings.project / "recipes", recipe_name)
        imports = imports or loaded.data.smoke.imports
        script = script or (loaded.smoke_gpu_script if gpu else loaded.smoke_script)
    if not imports or (gpu and script is None):
        raise UsageError("nothing to try", remedy="say --import MODULE, with --gpu also --script FILE, or --recipe NAME")
    bed, sm = _bed(wheel, stack_name, wanted(toolchain, own, python, cuda), settings)
    scratch = settings.home / "smoke" / str(os.getpid())
    scratch.mkdir(parents=True)
    trial = smoke.Trial(
        wheel=wheel.resolve(),
        imports=imports,
        script=script,
        bed=bed,
        folder=scratch,
        memory=pep517.bound(settings, meter.available_memory()),
        log=settings.home / "smoke" / "log.txt",
    )
    try:
        if gpu:
            answer = smoke.run_gpu(trial, sm)
            console.result(answer.model_dump(), smoke.sentence(answer))
            return
        result, outcome, _ = smoke.run(trial)
    finally:
        remove_tree(scratch)
    lines = [f"{module:30} {place}" for module, place in result.modules.items()]
    console.result(
        result.model_dump() | {"wall_s": outcome.wall_s},
        "\n".join([*lines, *([result.script.strip()] if result.script else [])]),
    )


def _bed(wheel: Path, stack_name: str, on: Wanted | Contained | None, settings: Settings) -> tuple[smoke.Bed, tuple[str, ...]]:
    """Where a wheel is tried, and the architectures that it must have."""
    from builder import audit as gates

    loaded, target = stack.load(settings.project / "stacks", stack_name), gates.target_of(wheel)
    host = stack.host_arch()
    if isinstance(on, Wanted):
        machine = find(loaded, on, cuda=False)
        site = host.ensure(machine, settings)
        return smoke.Bed(environment=site, root=Path("/"), machine=machine, emulated=host is not target), loaded.data.sm
    base = root.ensure(loaded, host, target, settings)
    site = environment.ensure(loaded, target, base, settings)
    return smoke.Bed(environment=site, root=base, emulated=host is not target), loaded.data.sm


@cli.command()
@click.argument("name", default="causal_conv1d")
@_aimed
@_common
def run(name: str, stack_name: str | None, target: str, as_json: bool) -> None:
    """The main job: build NAME, publish it to an index on this machine, install it back with pip, import it."""
    from builder.flow import run as run_flow

    settings, console = settings_module.load(), Console(as_json=as_json)
    result = run_flow.run(plan_of(name, stack_name, target, settings), settings, console)
    console.result(result.__dict__, f"wheel   {result.wheel}\nrecord  {result.record}\nlog     {result.log}")


@cli.command("lock-stack")
@click.argument("name")
@_common
def lock_stack(name: str, as_json: bool) -> None:
    """Resolve a stack anew and write its requirements.lock and root.lock, and toolchain.lock where Debian has its compiler."""
    settings, console = settings_module.load(), Console(as_json=as_json)
    loaded = stack.load(settings.project / "stacks", name)
    with console.progress("lock") as tick:
        atomic_write(loaded.requirements_lock, environment.resolve(loaded, settings, tick))
        atomic_write(loaded.root_lock, root.resolve(loaded, settings, tick))
        written = [loaded.requirements_lock, loaded.root_lock]
        if (text := toolkit.resolve(loaded, settings, tick)) is not None:
            atomic_write(loaded.toolchain_lock, text)
            written.append(loaded.toolchain_lock)
    console.result({"written": list(map(str, written))}, "\n".join(map(str, written)))


@cli.command("schema")
@click.option(
    "--write", type=click.Path(file_okay=False, path_type=Path), help="Write all schemas into this folder (docs/schema)."
)
def schema_(write: Path | None) -> None:
    """JSON schemas of recipe.toml, stack.toml and record.json, for editors."""
    for name, text in schema.documents().items():
        if write is not None:
            atomic_write(write / f"{name}.json", text)
        else:
            sys.stdout.write(text)


cli.add_command(key_command)
cli.add_command(lock_command)
cli.add_command(set_command)
cli.add_command(sign_command)
cli.add_command(verify_command)
cli.add_command(why_command)


def main() -> None:
    """The console script."""
    # Modes go into wheels, and what other programs say is searched: neither may differ with the person who builds.
    os.umask(0o022)
    os.environ["LC_ALL"] = "C"
    consoles.run(lambda: cli.main(standalone_mode=False, prog_name="builder"), as_json="--json" in sys.argv)
