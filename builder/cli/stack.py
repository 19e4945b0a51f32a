"""`builder stack`: create stacks."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import click
from packaging.version import Version

from builder.cli.options import start
from builder.ground import new_stack, resolve
from builder.ground.interpreters import catalogue
from builder.ground.new_stack import TorchRelease
from builder.planning import stack
from builder.planning.settings import Settings
from builder.planning.stack import HOST_SUFFIX, LoadedStack
from gracefarm.cli import CommandGroup, json_option
from gracefarm.console import Tick
from gracefarm.errors import ConfigError, UsageError
from gracefarm.files import atomic_directory, atomic_write, lock

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")


@click.group("stack", cls=CommandGroup)
def stack_command() -> None:
    """Create a stack.

    A stack (a folder in stacks/) pins the versions of torch, CUDA, Python and the compilers that wheels are built with.

    \b
    # Create the stack cu132 for torch 2.15.0.
    builder stack new cu132 --torch 2.15.0
    """


@stack_command.command("new")
@click.argument("name")
@click.option(
    "--torch", "version", required=True, metavar="VERSION", help="Version of torch, which must be on the Python index."
)
@click.option(
    "--like",
    metavar="STACK",
    help="Existing stack to copy all other settings from, such as the GPU architectures. The new stack also uses the Debian "
    "system of that stack. Default: the stack with the newest torch.",
)
@json_option
def new_command(name: str, version: str, like: str | None) -> None:
    """Create the stack NAME and its lock files for a version of torch.

    A stack (a folder in stacks/) pins the versions of torch, CUDA, Python and the compilers that wheels are built with. The
    new stack uses the CUDA version that this torch requires, and the compiler nvcc of the same CUDA version. The command
    writes a lock file (a list of packages with their digests) for each Python in interpreters/ that this torch supports.

    \b
    # Create the stack cu132 for torch 2.15.0.
    builder stack new cu132 --torch 2.15.0
    """
    settings, console = start(writes=True)
    folder = settings.project / "stacks"
    _require_new(name, folder)
    base = stack.load(folder, like) if like is not None else _newest(folder)
    pythons = _pythons(settings)
    with console.progress("stack") as tick, lock(settings.home / "locks" / f"stack-{name}"):
        tick(0, len(pythons) + 1, f"files of torch {version} on the index")
        release = new_stack.release_of(version, base, list(pythons), settings, datetime.now(UTC).date())
        with atomic_directory(folder / name) as partial:
            text = new_stack.render(name, release, base)
            atomic_write(partial / "stack.toml", text)
            failed = _lock_all(stack.load(folder, partial.name), release, pythons, settings, tick)
            reason = f"torch {release.version} has no wheel for it"
            left_out = {python: reason for python in pythons if python not in release.pythons} | failed
            atomic_write(partial / "stack.toml", text + new_stack.render_no_lock(left_out))
    locked = [python for python in pythons if python not in left_out]
    value = {"stack": name, "torch": release.version, "cuda": release.cuda, "pythons": locked, "left_out": left_out}
    lines = [
        f"stacks/{name}: torch {release.version}, CUDA {release.cuda}, root file system of {_root_of(base)}",
        f"locked for Python {', '.join(locked)}",
        *(f"no lock for Python {python}: {reason}" for python, reason in left_out.items()),
        f"Next: builder plan causal_conv1d --stack {name}",
    ]
    console.result(value, "\n".join(lines))


def _require_new(name: str, folder: Path) -> None:
    """Refuse a name that is invalid or in use."""
    if not _NAME.fullmatch(name) or name.endswith(HOST_SUFFIX):
        raise UsageError(
            f"{name!r} is not a valid name for a stack",
            remedy="use lower-case letters, digits, '.', '_' and '-', and begin with a letter or digit, such as cu132",
        )
    if (folder / name).exists():
        raise UsageError(
            f"the stack {name} already exists",
            remedy=f"choose a different name, or update the locks of the existing stack with `builder lock {name}`",
        )


def _newest(folder: Path) -> LoadedStack:
    """The stack with the newest torch."""
    loaded = [stack.load(folder, name) for name in stack.names(folder)]
    with_torch = [entry for entry in loaded if entry.data.torch is not None]
    if not with_torch:
        raise ConfigError(
            f"{folder} has no stack with torch that could be copied",
            remedy="create a project with `builder init DIR`, which has such stacks, and repeat the command there",
        )
    return max(with_torch, key=lambda entry: Version(entry.data.torch.version) if entry.data.torch else Version("0"))


def _root_of(base: LoadedStack) -> str:
    return (base.root_stack or base).data.name


def _pythons(settings: Settings) -> dict[str, str]:
    """Version to the name of its first interpreter in interpreters/."""
    folder = settings.project / "interpreters"
    names: dict[str, str] = {}
    for name in catalogue.names(folder):
        names.setdefault(catalogue.load(folder, name).python, name)
    return names


def _lock_all(
    new: LoadedStack, release: TorchRelease, pythons: dict[str, str], settings: Settings, tick: Tick
) -> dict[str, str]:
    """Write a lock for each Python with torch wheels; return the reason per version for which another package has no wheel."""
    failed: dict[str, str] = {}
    wanted = [python for python in pythons if python in release.pythons]
    for number, python in enumerate(wanted, 1):
        interpreter = None
        if python != new.data.python:
            interpreter = catalogue.load(settings.project / "interpreters", pythons[python])
        loaded = replace(new, interpreter=interpreter)
        try:
            text = resolve.requirements_lock(loaded, settings, _nested(tick, number, len(wanted), python))
        except ConfigError as error:
            if interpreter is None:
                raise
            failed[python] = error.cause
            continue
        atomic_write(loaded.requirements_lock, text)
    return failed


def _nested(tick: Tick, number: int, total: int, python: str) -> Tick:
    """The progress of one Python's lock as part of the whole."""
    return lambda _done, _total, text: tick(number, total + 1, f"Python {python}: {text}" if text else f"Python {python}")
