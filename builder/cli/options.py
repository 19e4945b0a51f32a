"""What a command line builds: recipe, stack, target, and whose toolchain."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from builder.planning import plan as planning
from builder.planning import recipe, stack
from builder.planning.plan import Contained, Plan
from builder.planning.stack import Arch
from builder.toolchains import container
from builder.toolchains.host_tools import Wanted, find
from gracefarm.errors import UsageError
from gracefarm.settings import Settings

Function = Any  # click's decorators are untyped about what they wrap

_PLACE = click.Path(exists=True, path_type=Path)


def toolchained(function: Function) -> Function:
    """The options of a build with this machine's own tools, or in a container."""
    toolchain = click.option(
        "--toolchain",
        type=click.Choice(["sandbox", "host", "container"]),
        default="sandbox",
        show_default=True,
        help="The stack's locked compilers in a sandbox, this machine's own gcc and CUDA in a clean environment, or "
        "cibuildwheel in the stack's container image.",
    )
    return toolchain(placed(function))


def placed(function: Function) -> Function:
    """The options that name this machine's own tools."""
    options = (
        click.option(
            "--environment",
            "own",
            type=_PLACE,
            help="With host: a Python or virtual environment to build against as it is; default: the stack's lock.",
        ),
        click.option("--python", type=_PLACE, help="With host: the interpreter of the clean environment."),
        click.option("--cuda", type=_PLACE, help="With host: the CUDA toolkit; default: CUDA_HOME, /usr/local/cuda, PATH."),
    )
    for option in reversed(options):
        function = option(function)
    return function


def wanted(toolchain: str, own: Path | None, python: Path | None, cuda: Path | None) -> Wanted | Contained | None:
    """What is wanted of this machine, or a container; None: a sandbox.

    Raises:
        UsageError: options that do not go together.
    """
    if toolchain != "host":
        for name, value in (("--environment", own), ("--python", python), ("--cuda", cuda)):
            if value is not None:
                raise UsageError(f"{name} is about this machine's tools", remedy=f"say --toolchain host {name} {value}")
        return container.find() if toolchain == "container" else None
    if own is not None and python is not None:
        raise UsageError("--environment names a Python already", remedy="leave --python out")
    return Wanted(environment=own, python=python, cuda=cuda)


def plan_of(name: str, stack_name: str | None, target: str, settings: Settings, on: Wanted | Contained | None = None) -> Plan:
    """The plan that a command line means."""
    loaded = recipe.load(settings.project / "recipes", name)
    base = stack.load(settings.project / "stacks", stack_name or loaded.data.stack)
    if not isinstance(on, Wanted):
        return planning.make(loaded, base, stack.host_arch(), Arch(target), on)
    return planning.make_here(loaded, find(base, on, cuda=loaded.data.build.cuda))


def as_built(
    inputs: Mapping[str, object], own: Path | None, python: Path | None, cuda: Path | None
) -> Wanted | Contained | None:
    """The toolchain of an earlier build with these inputs, as `wanted` has it.

    Raises:
        UsageError: it stood on an environment of somebody's own, whose place no input is, or options do not go together.
    """
    said = inputs.get("toolchain")
    kind = str(said["kind"]) if isinstance(said, dict) else "sandbox"
    if own is None and isinstance(said, dict) and "distributions" in said:
        raise UsageError(
            "that build stood on an environment of somebody's own, and nothing says where that is",
            remedy="say it: --environment PATH",
        )
    return wanted(kind, own, python, cuda)


def target_here(context: click.Context, target: str, on: Wanted | Contained | None) -> str:
    """The target of a host build is this machine; another one asked for is an error, the default is not.

    Raises:
        UsageError: another one was asked for.
    """
    if not isinstance(on, Wanted):
        return target
    here = stack.host_arch().value
    asked = context.get_parameter_source("target") is click.core.ParameterSource.COMMANDLINE
    if asked and target != here:
        raise UsageError(
            f"this machine's own toolchain builds for {here}, not for {target}",
            remedy=f"leave --toolchain host out: the sandbox builds for {target} here",
        )
    return here
