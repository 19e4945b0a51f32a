"""`builder lock`: write locks, and fill in unknown digests."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import click

from builder.cli.options import stack_of, start, toolchain_option
from builder.ground.interpreters import catalogue
from builder.ground.interpreters.debian_suite import DebianInterpreter
from builder.planning import gaps, pins, recipe, stack
from builder.planning.recipe import LoadedRecipe, ToolchainKind
from builder.planning.settings import Settings
from builder.planning.stack import LoadedStack
from builder.sets import definition
from builder.toolchains.kinds import KINDS
from gracefarm.cli import json_option
from gracefarm.console import Console
from gracefarm.errors import SeveralError, UsageError
from gracefarm.files import atomic_write

NAMES: Mapping[str, Callable[[Settings], list[str]]] = {
    "recipes": lambda settings: recipe.names(settings.project / "recipes"),
    "stacks": lambda settings: stack.names(settings.project / "stacks"),
    "sets": definition.names,
    "interpreters": lambda settings: catalogue.names(settings.project / "interpreters"),
}
"Folder of a project to the names of what can be locked in it."


@click.command("lock")
@click.argument("name", metavar="RECIPE|STACK|SET|INTERPRETER")
@click.option(
    "--python",
    metavar="NAME",
    help="With a stack: write only the lock for this Python, a folder in interpreters/, such as 3.13.",
)
@click.option(
    "--digests", is_flag=True, help="With a stack: fill in the unknown digests of the stack. Do not write lock files."
)
@click.option(
    "--stack",
    "stack_name",
    metavar="NAME",
    help="With a recipe: stack (a folder in stacks/) whose unknown digests are also filled in. Default: the stack that the "
    "recipe names.",
)
@toolchain_option(
    help="With a recipe, or with --digests: also fill in the digests that only builds with this toolchain require. container: "
    "the digests of the container images."
)
@json_option
def lock_command(name: str, python: str | None, digests: bool, stack_name: str | None, toolchain: ToolchainKind) -> None:
    """Write lock files, and fill in unknown digests.

    A lock file pins packages by version and digest (sha256). The argument is the name of a recipe, stack, set or
    interpreter:

    \b
    RECIPE (a folder in recipes/)
        Write the lock of the packages that the build requires. If there is no
        wheel for a Python, the command prints a warning, and the lock leaves
        out this Python. Also download
        each file whose digest is unknown, and write its digest into the recipe
        or its stack. Compare these digests with another source before you
        commit them.
    STACK (a folder in stacks/)
        Write the locks of the Python packages and Debian packages.
    SET (a folder in sets/)
        Write the lock of the packages that the set installs. Files that were
        uploaded after the date resolved_before in set.toml are ignored.
    INTERPRETER (a folder in interpreters/)
        Write the lock of the Debian packages. Only a Python from Debian needs
        this lock.

    If the name exists in several folders, add the folder, such as sets/NAME.

    \b
    # Lock the build requirements of triton, and fill in unknown digests.
    builder lock triton
    # Also fill in the digests of the container images.
    builder lock flash_attn --toolchain container
    # Write the lock of the stack cu130 for Python 3.13.
    builder lock cu130 --python 3.13
    # Fill in the unknown digests of the stack cu124.
    builder lock cu124 --digests
    # Write the lock of the set gh200-cu130.
    builder lock gh200-cu130
    """
    settings, console = start(writes=True)
    folder, name = find(name, settings)
    for option, given in (("--python", python is not None), ("--digests", digests)):
        if given and folder != "stacks":
            raise UsageError(f"{option} requires a stack, but {name} is in {folder}/", remedy=f"omit {option}")
    if stack_name is not None and folder != "recipes":
        raise UsageError(f"--stack requires a recipe, but {name} is in {folder}/", remedy="omit --stack")
    chosen = click.get_current_context().get_parameter_source("toolchain") is click.core.ParameterSource.COMMANDLINE
    if chosen and folder != "recipes" and not digests:
        raise UsageError(
            "--toolchain requires a recipe, or a stack with --digests",
            remedy="omit --toolchain, or add --digests" if folder == "stacks" else "omit --toolchain",
        )
    if folder == "interpreters":
        _lock_interpreter(name, settings, console)
    elif folder == "sets":
        _lock_set(name, settings, console)
    elif folder == "recipes":
        _lock_recipe(name, stack_name, toolchain, settings, console)
    elif digests:
        _fill(name, gaps.of_stack(base := stack_of(name, python, settings)), base, toolchain, settings, console)
    else:
        _lock_stack(stack_of(name, python, settings), settings, console)


def find(name: str, settings: Settings) -> tuple[str, str]:
    """The folder of the project that has `name`, and the name in it.

    Raises:
        UsageError: several folders have it.
    """
    folder, _, rest = name.rpartition("/")
    if folder in NAMES:
        return folder, rest
    folders = [folder for folder, names in NAMES.items() if name in names(settings)]
    if len(folders) > 1:
        spellings = " or ".join(f"`builder lock {folder}/{name}`" for folder in folders)
        raise UsageError(
            f"the name is ambiguous: {name} is in {' and in '.join(f'{folder}/' for folder in folders)}",
            remedy=f"run {spellings}",
        )
    # An unknown name counts as a recipe, whose error lists the known ones.
    return (folders or ["recipes"])[0], name


def _lock_recipe(name: str, stack_name: str | None, toolchain: ToolchainKind, settings: Settings, console: Console) -> None:
    loaded = recipe.load(settings.project / "recipes", name)
    base = stack.load(settings.project / "stacks", stack_name or loaded.data.stack)
    if loaded.data.build.requires:
        _lock_build(loaded, base, settings, console)
    _fill(name, [*gaps.of_recipe(loaded), *gaps.of_stack(loaded.on(base))], base, toolchain, settings, console)


def _fill(
    name: str, missing: list[gaps.Gap], base: LoadedStack, toolchain: ToolchainKind, settings: Settings, console: Console
) -> None:
    """Fill in unknown digests; a file that cannot be fetched does not stop the others."""
    from builder.fetch import fill

    with console.progress("lock") as tick:
        filled = fill.fill([*missing, *KINDS[toolchain].gaps(base)], base, settings, tick)
    for kind in KINDS.values():
        for gap in kind.gaps(base) if kind.kind != toolchain else ():
            console.step("lock", f"skipped the digest of {gap.what}, which only --toolchain {kind.kind} requires")
    rows = [{"file": str(gap.file), "what": gap.what, "url": gap.url, "sha256": sha256} for gap, sha256 in filled.digests]
    lines = [f"{row['sha256']}  {row['what']}  {row['url']}" for row in rows]
    if rows or not filled.failed:
        console.result(rows, "\n".join(lines) or f"{name}: all digests are known")
    count = len(filled.failed)
    if count == 1:
        raise filled.failed[0]
    for error in filled.failed:
        console.error(error)
    if count:
        raise SeveralError(
            f"{count} of {count + len(rows)} digests could not be fetched; see the errors above",
            remedy="fix these errors, then repeat the command",
        )


def _lock_build(loaded: LoadedRecipe, base: LoadedStack, settings: Settings, console: Console) -> None:
    """Write the lock of a recipe's build requirements."""
    text = build_lock(loaded, base, settings, console)
    assert loaded.build_requirements is not None
    atomic_write(loaded.build_requirements.lock, text)
    console.step("lock", f"wrote {loaded.build_requirements.lock}")


def build_lock(loaded: LoadedRecipe, base: LoadedStack, settings: Settings, console: Console) -> str:
    """The lock of a recipe's build requirements, for each Python with a lock in its stack. Warn of Pythons that it leaves out.

    Raises:
        ConfigError, FetchError: see `resolve.build_lock`.
    """
    from builder.ground import resolve

    names = [None, *catalogue.names(settings.project / "interpreters")]
    stacks = [stack_of(base.folder.name, name, settings) for name in names]
    with console.progress("lock") as tick:
        text, left_out = resolve.build_lock(
            loaded, [entry for entry in stacks if entry.requirements_lock.is_file()], settings, tick
        )
    for (python, arch), reason in left_out.items():
        console.warn(f"left out Python {python} on {arch}: {reason}")
    return text


def _lock_interpreter(name: str, settings: Settings, console: Console) -> None:
    interpreter = catalogue.load(settings.project / "interpreters", name)
    if not isinstance(interpreter, DebianInterpreter):
        console.result([], f"interpreter {name} needs no lock, because interpreter.toml contains its pins")
        return
    with console.progress("lock") as tick:
        atomic_write(interpreter.lock_file, interpreter.lock(settings, tick))
    console.result([str(interpreter.lock_file)], str(interpreter.lock_file))


def _lock_stack(loaded: LoadedStack, settings: Settings, console: Console) -> None:
    """Write requirements.lock; root.lock unless it uses another stack's root; toolchain.lock if Debian has its compiler."""
    from builder.ground import resolve

    with console.progress("lock") as tick:
        atomic_write(loaded.requirements_lock, resolve.requirements_lock(loaded, settings, tick))
        written = [loaded.requirements_lock]
        if loaded.interpreter is None:
            if loaded.root_stack is None:
                atomic_write(loaded.root_lock, resolve.root_lock(loaded, settings, tick))
                written.append(loaded.root_lock)
            if (text := resolve.toolchain_lock(loaded, settings, tick)) is not None:
                atomic_write(loaded.toolchain_lock, text)
                written.append(loaded.toolchain_lock)
    console.result({"written": list(map(str, written))}, "\n".join(map(str, written)))


def _lock_set(name: str, settings: Settings, console: Console) -> None:
    """Write requirements.lock of a set with requirements; another set runs in its stack's environment."""
    from builder.ground import resolve

    loaded = definition.load(name, settings)
    place = loaded.runtime.requirements_lock
    if not loaded.data.requirements:
        console.result(
            {"written": []},
            f"set {name} runs in the environment of stack {loaded.data.stack}. `{loaded.stack.lock_command}` writes its lock: "
            f"{place}",
        )
        return
    with console.progress("lock") as tick:
        atomic_write(place, resolve.requirements_lock(loaded.runtime, settings, tick))
    count = len(pins.wheels(loaded.runtime, loaded.data.target))
    console.result({"written": [str(place)], "wheels": count}, f"{place}: {count} wheels")
