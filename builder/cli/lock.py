"""`builder lock` and `builder lock-stack`: digests that were not known, and the locks of a stack."""

from __future__ import annotations

import click

from builder.cli.options import json_option, stack_of, start, toolchain_option
from builder.ground import interpreters
from builder.ground.interpreters.debian_suite import DebianInterpreter
from builder.planning import gaps, recipe, stack
from builder.planning.recipe import LoadedRecipe, ToolchainKind
from builder.planning.settings import Settings
from builder.planning.stack import LoadedStack
from builder.toolchains import KINDS
from gracefarm.console import Console
from gracefarm.errors import SeveralError
from gracefarm.files import atomic_write


@click.command("lock")
@click.argument("name")
@click.option("--stack", "stack_name", metavar="NAME", help="Stack whose gaps are filled in too; default: the recipe's.")
@toolchain_option(help="With container: the stack's container image too, which no other toolchain needs.")
@json_option
def lock_command(name: str, stack_name: str | None, toolchain: ToolchainKind, as_json: bool) -> None:
    """Fill in the digests of NAME, a recipe (with its stack) or a stack, that were not known where it was written; of an
    interpreter of Debian's, write packages.lock.

    The file comes over the network once, unchecked; its digest is written into the TOML for a person to compare and commit.
    One that cannot be had stops no other.

    \b
    builder lock triton
    builder lock cu124
    builder lock flash_attn --toolchain container
    builder lock 3.13-trixie
    """
    from builder.fetch import fill

    settings, console = start(as_json=as_json, writes=True)
    if name in interpreters.names(settings.project / "interpreters"):
        _lock_interpreter(name, settings, console)
        return
    if stack_name is None and name in stack.names(settings.project / "stacks"):
        loaded, base = None, stack.load(settings.project / "stacks", name)
    else:
        loaded = recipe.load(settings.project / "recipes", name)
        base = stack.load(settings.project / "stacks", stack_name or loaded.data.stack)
    if loaded is not None and loaded.data.build.requires:
        _lock_build(loaded, base, settings, console)
    with console.progress("lock") as tick:
        own = [*gaps.of_recipe(loaded), *gaps.of_stack(loaded.on(base))] if loaded is not None else gaps.of_stack(base)
        missing = [*own, *KINDS[toolchain].gaps(base)]
        filled = fill.fill(missing, base, settings, tick)
    for kind in KINDS.values():
        for gap in kind.gaps(base) if kind.kind != toolchain else ():
            console.step("lock", f"left for --toolchain {kind.kind}: {gap.what}")
    rows = [{"file": str(gap.file), "what": gap.what, "url": gap.url, "sha256": sha256} for gap, sha256 in filled.digests]
    lines = [f"{row['sha256']}  {row['what']}  {row['url']}" for row in rows]
    if rows or not filled.failed:
        console.result(rows, "\n".join(lines) or f"{name} has no gap: every digest is there")
    count = len(filled.failed)
    if count == 1:
        raise filled.failed[0]
    for error in filled.failed:
        console.error(error)
    if count:
        raise SeveralError(f"{count} of {count + len(rows)} digests cannot be had; each is described above")


def _lock_build(loaded: LoadedRecipe, base: LoadedStack, settings: Settings, console: Console) -> None:
    """Write the lock of a recipe's build requirements, for each Python that its stack has a lock for."""
    from builder.ground import resolve

    names = [None, *interpreters.names(settings.project / "interpreters")]
    stacks = [stack_of(base.folder.name, name, settings) for name in names]
    with console.progress("lock") as tick:
        text = resolve.build_lock(loaded, [entry for entry in stacks if entry.requirements_lock.is_file()], settings, tick)
    assert loaded.build_requirements is not None
    atomic_write(loaded.build_requirements.lock, text)
    console.step("lock", f"wrote {loaded.build_requirements.lock}")


def _lock_interpreter(name: str, settings: Settings, console: Console) -> None:
    interpreter = interpreters.load(settings.project / "interpreters", name)
    if not isinstance(interpreter, DebianInterpreter):
        console.result([], f"{name} is pinned in its interpreter.toml: it has no lock")
        return
    with console.progress("lock") as tick:
        atomic_write(interpreter.lock_file, interpreter.lock(settings, tick))
    console.result([str(interpreter.lock_file)], str(interpreter.lock_file))


@click.command("lock-stack")
@click.argument("name")
@click.option("--python", metavar="NAME", help="Lock the wheels of this interpreter alone; default: the stack's own Python.")
@json_option
def lock_stack_command(name: str, python: str | None, as_json: bool) -> None:
    """Resolve a stack and write its locks.

    These are requirements.lock; root.lock, unless it takes another stack's root; toolchain.lock, if its compiler is Debian's.

    \b
    builder lock-stack cu130
    builder lock-stack cu130 --python 3.13
    """
    from builder.ground import resolve

    settings, console = start(as_json=as_json, writes=True)
    loaded = stack_of(name, python, settings)
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
