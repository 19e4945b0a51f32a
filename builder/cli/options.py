"""What commands share: their options, settings and console; recipe, stack, target and toolchain that a command line means."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from builder import toolchains
from builder.ground import interpreters
from builder.planning import device_code, recipe, stack
from builder.planning.plan import Plan, Wanted
from builder.planning.recipe import ToolchainKind
from builder.planning.settings import PACKAGED, Settings, load
from builder.planning.stack import Arch, LoadedStack
from builder.proof import record
from builder.proof.record import Record
from builder.toolchains import KINDS
from builder.toolchains.choice import ToolchainChoice
from gracefarm.console import Console
from gracefarm.errors import ConfigError, UsageError

Function = Any  # click's decorators are untyped about what they wrap

_PLACE = click.Path(exists=True, path_type=Path)
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
"The type of a file that must be there."

json_option = click.option("--json", "as_json", is_flag=True, help="JSON lines for machines.")
jobs_option = click.option("--jobs", type=click.IntRange(1), help="Upper bound of parallel compilations.")
toolchain_option = functools.partial(
    click.option,
    "--toolchain",
    type=click.Choice(list(KINDS)),
    default="sandbox",
    show_default=True,
)
_STACK_AND_TARGET = (
    click.option("--stack", "stack_name", metavar="NAME", help="Stack to build against; default: the recipe's."),
    click.option(
        "--target",
        type=click.Choice([arch.value for arch in Arch]),
        default=Arch.AARCH64.value,
        show_default=True,
        help="The wheel's architecture.",
    ),
)
_TOOLS = (
    click.option(
        "--environment",
        "own",
        type=_PLACE,
        help="With host: a Python or virtual environment to build against as it is; default: the stack's lock.",
    ),
    click.option(
        "--python",
        metavar="NAME",
        help="The target's Python, a folder of interpreters/, as 3.13; default: the stack's own. With host: the path of this "
        "machine's interpreter.",
    ),
    click.option("--cuda", type=_PLACE, help="With host: the CUDA toolkit; default: CUDA_HOME, /usr/local/cuda, PATH."),
)
_DEVICE_CODE = (
    click.option("--sm", metavar="LIST", help="Architectures of the device code, as 90 or 90a+100f; default: the stack's."),
    click.option("--ptx", metavar="SM", help="Architecture of the PTX for newer GPUs, or none; default: the recipe's."),
)
_TOOLCHAIN = (
    toolchain_option(
        help="The stack's locked compilers in a sandbox, this machine's own gcc and CUDA in a clean environment, or "
        "cibuildwheel in the stack's container image.",
    ),
    *_TOOLS,
)


@dataclass(frozen=True, kw_only=True)
class Aim:
    """What a command line builds against."""

    stack: str | None
    "None: the recipe's own."
    target: str
    on: ToolchainChoice


def start(*, as_json: bool = False, writes: bool = False) -> tuple[Settings, Console]:
    """What a command begins with; `writes`: it changes files of the project.

    Raises:
        UsageError: it would change those of the installed package.
    """
    settings = load()
    if writes and settings.project == PACKAGED:
        raise UsageError(
            "the recipes, stacks and sets of the installed gracefarm are not changed",
            remedy="`builder init DIR` makes a project of your own: repeat the command there",
        )
    return settings, Console(as_json=as_json)


def _with(function: Function, *options: Function) -> Function:
    for option in reversed(options):
        function = option(function)
    return function


def aimed(function: Function) -> Function:
    """--stack, --target, the device code's and the toolchain's options, given to the command as `aim`."""

    @functools.wraps(function)
    def with_aim(
        *arguments: Any,
        stack_name: str | None,
        target: str,
        sm: tuple[str, ...] | None,
        ptx: str | None,
        on: ToolchainChoice,
        **options: Any,
    ) -> Any:
        aim = Aim(stack=stack_name, target=_target_here(target, on), on=replace(on, sm=sm, ptx=ptx))
        return function(*arguments, aim=aim, **options)

    return _with(toolchained(device_coded(with_aim)), *_STACK_AND_TARGET)


def device_coded(function: Function) -> Function:
    """The architectures of the device code and of its PTX, given to the command as `sm` and `ptx`."""

    @functools.wraps(function)
    def with_device_code(*arguments: Any, sm: str | None, ptx: str | None, **options: Any) -> Any:
        values = device_code.parse(sm) if sm is not None else None
        return function(*arguments, sm=values, ptx=device_code.parse_ptx(ptx) if ptx is not None else None, **options)

    return _with(with_device_code, *_DEVICE_CODE)


def aimed_at_sandbox(function: Function) -> Function:
    """--stack and --target alone."""
    return _with(function, *_STACK_AND_TARGET)


def toolchained(function: Function) -> Function:
    """The options of a build with this machine's own tools, or in a container, given to the command as `on`."""

    @functools.wraps(function)
    def with_toolchain(
        *arguments: Any, toolchain: ToolchainKind, own: Path | None, python: str | None, cuda: Path | None, **options: Any
    ) -> Any:
        return function(*arguments, on=wanted(toolchain, own, python, cuda), **options)

    return _with(with_toolchain, *_TOOLCHAIN)


def placed(function: Function) -> Function:
    """The options that name this machine's own tools."""
    return _with(function, *_TOOLS)


def wanted(toolchain: ToolchainKind, own: Path | None, python: str | None, cuda: Path | None) -> ToolchainChoice:
    """The toolchain that is wanted.

    Raises:
        UsageError: options that do not go together.
    """
    native = KINDS[toolchain].native
    here = Path(python) if python is not None and native else None
    if here is not None and not here.exists():
        raise UsageError(f"--python {python}: there is no such file", remedy="name a Python of this machine by its path")
    choice = ToolchainChoice(
        kind=toolchain, wanted=Wanted(environment=own, python=here, cuda=cuda), interpreter=None if native else python
    )
    for name, value in (("--environment", own), ("--cuda", cuda)):
        if value is not None and not choice.type.native:
            raise UsageError(f"{name} is about this machine's tools", remedy=f"say --toolchain host {name} {value}")
    if own is not None and python is not None:
        raise UsageError("--environment names a Python already", remedy="leave --python out")
    return choice


def plan_of(name: str, stack_name: str | None, target: str, settings: Settings, on: ToolchainChoice | None = None) -> Plan:
    """The plan that a command line means."""
    loaded = recipe.load(settings.project / "recipes", name)
    on = on or ToolchainChoice()
    return on.plan(loaded, stack_of(stack_name or loaded.data.stack, on.interpreter, settings), Arch(target))


def stack_of(name: str, interpreter: str | None, settings: Settings) -> LoadedStack:
    """The stack called `name`, with the interpreter of that name; None: with its root's own Python.

    Raises:
        ConfigError: the project has no such stack or interpreter.
    """
    base = stack.load(settings.project / "stacks", name)
    if interpreter is None:
        return base
    return replace(base, interpreter=interpreters.load(settings.project / "interpreters", interpreter))


def as_built(built: Record, own: Path | None, python: str | None, cuda: Path | None) -> ToolchainChoice:
    """The toolchain of an earlier build, as `wanted` has it.

    Raises:
        UsageError: it stood on an environment of somebody's own, whose place no input is, or options do not go together.
    """
    toolchain = built.inputs.get("toolchain")
    if own is None and isinstance(toolchain, dict) and "distributions" in toolchain:
        raise UsageError(
            "that build stood on an environment of somebody's own, and nothing says where that is",
            remedy="say it: --environment PATH",
        )
    on = wanted(toolchains.of_inputs(built.inputs).kind, own, python or built.interpreter, cuda)
    return replace(on, sm=built.asked_sm, ptx=built.asked_ptx)


def _target_here(target: str, on: ToolchainChoice) -> str:
    """The target of a host build is this machine; another one asked for is an error, the default is not.

    Raises:
        UsageError: another one was asked for.
    """
    if not on.type.native:
        return target
    here = stack.host_arch().value
    asked = click.get_current_context().get_parameter_source("target") is click.core.ParameterSource.COMMANDLINE
    if asked and target != here:
        raise UsageError(
            f"this machine's own toolchain builds for {here}, not for {target}",
            remedy=f"leave --toolchain host out: the sandbox builds for {target} here",
        )
    return here


def last_build(name: str, settings: Settings) -> Record:
    """The record of the last build of the recipe that a command line names.

    Raises:
        ConfigError: there is no such recipe, or it was never built here.
    """
    return record.latest(settings, recipe.load(settings.project / "recipes", name).key)


def last_wheel(name: str, settings: Settings) -> tuple[Record, Path]:
    """The last build of a recipe, and its wheel.

    Raises:
        ConfigError: as `last_build`; or there is no wheel.
    """
    last = last_build(name, settings)
    wheel = record.wheel_path(settings, last)
    if wheel is None:
        raise ConfigError(f"the last build of {name} left no wheel", remedy=f"run `builder build {name}`")
    return last, wheel
