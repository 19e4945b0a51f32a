"""Code that the commands share: options, settings and console; recipe, stack, target and toolchain of a command line."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from builder.ground.interpreters import catalogue
from builder.planning import device_code, matrix, recipe, stack
from builder.planning.plan import Plan, Wanted
from builder.planning.recipe import ToolchainKind
from builder.planning.settings import PACKAGED, Settings, load
from builder.planning.stack import Arch, LoadedStack
from builder.proof import record
from builder.proof.record import Record
from builder.toolchains import kinds
from builder.toolchains.choice import ToolchainChoice
from builder.toolchains.kinds import KINDS
from gracefarm.cli import json_requested
from gracefarm.console import Console
from gracefarm.errors import ConfigError, UsageError

Function = Any  # click's decorators do not type the functions that they wrap

_PLACE = click.Path(exists=True, path_type=Path)
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
"The type of an existing file."

jobs_option = click.option(
    "--jobs",
    type=click.IntRange(1),
    help="Maximum number of parallel compilations. Default: as many as CPU cores and memory allow.",
)
publish_option = functools.partial(
    click.option, "--publish", "url", metavar="URL", callback=lambda _context, _parameter, url: url or None
)
toolchain_option = functools.partial(
    click.option,
    "--toolchain",
    type=click.Choice(list(KINDS)),
    default="sandbox",
    show_default=True,
)
_STACK = click.option(
    "--stack",
    "stack_name",
    metavar="NAME",
    help="Stack (a folder in stacks/) to build against. A stack pins torch, CUDA, Python and compilers. Default: the stack "
    "that the recipe names.",
)
_target_option = functools.partial(
    click.option,
    "--target",
    type=click.Choice([arch.value for arch in Arch]),
    default=Arch.AARCH64.value,
    show_default=True,
)
_TARGET_HELP = "Processor architecture of the wheel."
_STACK_AND_TARGET = (
    _STACK,
    _target_option(help=f"{_TARGET_HELP} With --toolchain host, it is always the architecture of this machine."),
)
_OF_SANDBOX = (_STACK, _target_option(help=_TARGET_HELP))
_TOOLS = (
    click.option(
        "--environment",
        "own",
        type=_PLACE,
        help="With --toolchain host: Python interpreter or virtual environment to build against. Default: a new environment "
        "with the packages that the stack pins.",
    ),
    click.option(
        "--python",
        metavar="NAME",
        help=f"Python of the wheel: a folder in interpreters/, such as 3.13, or {matrix.ROOT} for the Python of the stack. "
        f"Default: {matrix.ROOT}. With --toolchain host: path of a Python on this machine. The default is then the Python on "
        "PATH that has the same version as the stack's Python.",
    ),
    click.option(
        "--cuda",
        type=_PLACE,
        help="With --toolchain host: folder of the CUDA toolkit. Default: the environment variable CUDA_HOME, else "
        "/usr/local/cuda, else the toolkit that contains the nvcc on PATH.",
    ),
)


def _device_code(sm: str, ptx: str) -> tuple[Function, Function]:
    return click.option("--sm", metavar="LIST", help=sm), click.option("--ptx", metavar="SM", help=ptx)


_DEVICE_CODE = _device_code(
    "GPU architectures to compile for, joined with +, such as 90 or 90a+100f. 90 stands for compute capability 9.0. Default: "
    "the architectures in the stack.",
    "Also include PTX (portable GPU code) for this GPU architecture, such as 90. GPUs of this and of newer architectures can "
    "run this PTX. none: include no PTX. Default: the value in the recipe, else the value in the stack.",
)
_AUDITED_DEVICE_CODE = _device_code(
    "GPU architectures that the wheel must have code for, joined with +, such as 90 or 90a+100f. 90 stands for compute "
    "capability 9.0. Default: the architectures in the stack.",
    "GPU architecture that the wheel must have PTX for, such as 90. none: the wheel must have no PTX. Default: the value in "
    "the recipe, else the value in the stack.",
)
_VARIANT = click.option(
    "--variant",
    is_flag=True,
    help="Add a variant label (PEP 825, a draft) to the wheel's file name. The label names the GPU architectures of the "
    "wheel.",
)
_TWIN = click.option(
    "--twin",
    is_flag=True,
    help="Build the x86_64 twin of an aarch64 wheel. If the twin passes a test on a GPU, the certificate also applies to "
    "the aarch64 wheel (see `builder certify`). GPU code depends on whether the type char is signed, so the twin's GPU "
    "code is compiled with an unsigned char, as on aarch64. A twin cannot be published.",
)
_TOOLCHAIN = (
    toolchain_option(
        help="Compilers to use. sandbox: the compilers that the stack pins, in a sandbox without network. host: gcc and CUDA "
        "of this machine. container: the program cibuildwheel, in the container image that the stack names.",
    ),
    *_TOOLS,
)
_TRIAL = (
    toolchain_option(
        help="Where to install the wheel. sandbox: in a sandbox with the Debian system of the stack. container: the same as "
        "sandbox. host: on this machine.",
    ),
    click.option(
        "--environment",
        "own",
        type=_PLACE,
        help="With --toolchain host: Python interpreter or virtual environment. The wheel is installed in a copy of this "
        "environment. Default: a new environment with the packages that the stack pins.",
    ),
    _TOOLS[1],
)

_COMPARED_TOOLS = (
    click.option(
        "--environment",
        "own",
        type=_PLACE,
        help="For builds with --toolchain host: Python interpreter or virtual environment to compare with. Required if the "
        "earlier build used --environment. Otherwise the default is a new environment with the packages that the stack pins.",
    ),
    click.option(
        "--python",
        metavar="NAME",
        help=f"Python to compare with: a folder in interpreters/, such as 3.13, or {matrix.ROOT} for the Python of the "
        "stack. Default: the Python of the earlier build. For builds with --toolchain host: path of a Python on this "
        "machine. The default is then the Python on PATH that has the same version as the stack's Python.",
    ),
    click.option(
        "--cuda",
        type=_PLACE,
        help="For builds with --toolchain host: folder of the CUDA toolkit to compare with. Default: the environment "
        "variable CUDA_HOME, else /usr/local/cuda, else the toolkit that contains the nvcc on PATH.",
    ),
)

cuda_option = _TOOLS[2]

LLVM, SOURCE = "llvm", "source"
_LLVM = click.option(
    f"--{LLVM}",
    type=click.Choice(["archive", SOURCE]),
    default="archive",
    show_default=True,
    help="For recipes that link with LLVM, such as triton: how to get LLVM. archive: download the archive that the recipe "
    "pins. source: first build LLVM with the recipe llvm.",
)


@dataclass(frozen=True, kw_only=True)
class Aim:
    """Stack, target and toolchain of a command line."""

    stack: str | None
    "None: the recipe's."
    target: str
    on: ToolchainChoice


def start(*, writes: bool = False) -> tuple[Settings, Console]:
    """Settings and console of a command; `writes`: it changes files of the project.

    Raises:
        UsageError: the command would change files of the installed package.
    """
    settings = load()
    if writes and settings.project == PACKAGED:
        raise UsageError(
            "recipes, stacks and sets of the installed gracefarm cannot be changed",
            remedy="create a project with `builder init DIR` and repeat the command there",
        )
    return settings, Console(as_json=json_requested())


def _with(function: Function, *options: Function) -> Function:
    for option in reversed(options):
        function = option(function)
    return function


def aimed(function: Function) -> Function:
    """Add --stack, --target and the options of device code and toolchain; the command receives `aim`."""

    @functools.wraps(function)
    def with_aim(
        *arguments: Any,
        stack_name: str | None,
        target: str,
        sm: tuple[str, ...] | None,
        ptx: str | None,
        from_source: tuple[str, ...],
        variant: bool,
        twin: bool,
        on: ToolchainChoice,
        **options: Any,
    ) -> Any:
        on = replace(on, sm=sm, ptx=ptx, variant=variant, twin=twin, from_source=from_source)
        return function(*arguments, aim=Aim(stack=stack_name, target=_target_here(target, on), on=on), **options)

    return _with(with_trees(toolchained(device_coded(with_aim))), *_STACK_AND_TARGET, _VARIANT, _TWIN)


def with_trees(function: Function) -> Function:
    """Add --llvm; the command receives `from_source`, the recipes whose trees replace downloads."""

    @functools.wraps(function)
    def with_source(*arguments: Any, llvm: str, **options: Any) -> Any:
        return function(*arguments, from_source=(LLVM,) if llvm == SOURCE else (), **options)

    return _with(with_source, _LLVM)


def device_coded(function: Function, *, audits: bool = False) -> Function:
    """Add the options of the device code; the command receives `sm` and `ptx`. `audits`: it checks a finished wheel."""

    @functools.wraps(function)
    def with_device_code(*arguments: Any, sm: str | None, ptx: str | None, **options: Any) -> Any:
        values = device_code.parse(sm) if sm is not None else None
        return function(*arguments, sm=values, ptx=device_code.parse_ptx(ptx) if ptx is not None else None, **options)

    return _with(with_device_code, *(_AUDITED_DEVICE_CODE if audits else _DEVICE_CODE))


def aimed_at_sandbox(function: Function) -> Function:
    """Add --stack and --target."""
    return _with(function, *_OF_SANDBOX)


def toolchained(function: Function, *, builds: bool = True) -> Function:
    """Add the options of the toolchain, or of the place of a test; the command receives `on`."""

    @functools.wraps(function)
    def with_toolchain(
        *arguments: Any,
        toolchain: ToolchainKind,
        own: Path | None,
        python: str | None,
        cuda: Path | None = None,
        **options: Any,
    ) -> Any:
        return function(*arguments, on=wanted(toolchain, own, python, cuda), **options)

    return _with(with_toolchain, *(_TOOLCHAIN if builds else _TRIAL))


def tried(function: Function) -> Function:
    """Add the options of the place where a wheel is tested; the command receives `on`."""
    return toolchained(function, builds=False)


def compared(function: Function) -> Function:
    """Add the options of a plan that is compared with an earlier build."""
    return _with(function, *_COMPARED_TOOLS)


def wanted(toolchain: ToolchainKind, own: Path | None, python: str | None, cuda: Path | None) -> ToolchainChoice:
    """The toolchain of a command line.

    Raises:
        UsageError: options cannot be used together.
    """
    native = KINDS[toolchain].native
    here = Path(python) if python is not None and native else None
    if here is not None and not here.exists():
        raise UsageError(
            f"--python {python}: the file does not exist", remedy="give the path of a Python interpreter on this machine"
        )
    interpreter = None if native or python == matrix.ROOT else python
    choice = ToolchainChoice(kind=toolchain, wanted=Wanted(environment=own, python=here, cuda=cuda), interpreter=interpreter)
    for name, value in (("--environment", own), ("--cuda", cuda)):
        if value is not None and not choice.type.native:
            raise UsageError(f"{name} requires --toolchain host", remedy=f"use --toolchain host {name} {value}")
    if own is not None and python is not None:
        raise UsageError("--environment and --python cannot be used together", remedy="omit --python")
    return choice


def plan_of(name: str, stack_name: str | None, target: str, settings: Settings, on: ToolchainChoice | None = None) -> Plan:
    """The plan of a command line."""
    loaded = recipe.load(settings.project / "recipes", name)
    on = on or ToolchainChoice()
    return on.plan(loaded, stack_of(stack_name or loaded.data.stack, on.interpreter, settings), Arch(target))


def stack_of(name: str, interpreter: str | None, settings: Settings) -> LoadedStack:
    """The stack `name` with an interpreter; None: with the Python of its root.

    Raises:
        ConfigError: the project has no such stack or interpreter.
    """
    return catalogue.into(stack.load(settings.project / "stacks", name), settings.project / "interpreters", interpreter)


def as_built(built: Record, own: Path | None, python: str | None, cuda: Path | None) -> ToolchainChoice:
    """The toolchain of an earlier build.

    Raises:
        UsageError: it used an environment of the user, whose path is not recorded; options do not apply to its toolchain, or
            cannot be used together.
    """
    toolchain = kinds.of_inputs(built.inputs)
    for name, value in (("--environment", own), ("--cuda", cuda)):
        if value is not None and not toolchain.native:
            raise UsageError(
                f"{name} applies only to builds with the host toolchain, but the earlier build used the toolchain "
                f"{toolchain.kind}",
                remedy=f"omit {name}",
            )
    if own is None and toolchain.used_environment(built.inputs):
        raise UsageError(
            "the earlier build used --environment, but its record does not contain the path",
            remedy="add --environment PATH, with the path that the earlier build used",
        )
    on = wanted(toolchain.kind, own, python or built.interpreter, cuda)
    asked = replace(on, sm=built.asked_sm, ptx=built.asked_ptx, variant=built.asked_variant, twin=built.asked_twin)
    return replace(asked, from_source=built.from_source)


def _target_here(target: str, on: ToolchainChoice) -> str:
    """The target of a host build is this machine. Asking for another target is an error; the default is not.

    Raises:
        UsageError: --target names another architecture.
    """
    if not on.type.native:
        return target
    here = stack.host_arch().value
    asked = click.get_current_context().get_parameter_source("target") is click.core.ParameterSource.COMMANDLINE
    if asked and target != here:
        raise UsageError(
            f"the host toolchain builds for {here}, not for {target}",
            remedy=f"omit --toolchain host; the sandbox can build for {target}",
        )
    return here


def last_build(name: str, settings: Settings) -> Record:
    """The record of the last build of a recipe.

    Raises:
        ConfigError: the recipe does not exist, or was never built on this machine.
    """
    return record.latest(settings, recipe.load(settings.project / "recipes", name).key)


def last_wheel(name: str, settings: Settings) -> tuple[Record, Path]:
    """The last build of a recipe, and its wheel.

    Raises:
        ConfigError: as `last_build`, or the build produced no wheel.
    """
    last = last_build(name, settings)
    wheel = record.wheel_path(settings, last)
    if wheel is None:
        raise ConfigError(
            f"the last build of {name} has no wheel: it failed, or its wheel was removed or changed",
            remedy=f"run `builder build {name}`; `builder show {name}` prints the error of a failed build",
        )
    return last, wheel
