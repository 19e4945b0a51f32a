"""The interpreters of a project, by name; `load` chooses the kind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from builder.ground.interpreters.archive import ArchiveInterpreter
from builder.ground.interpreters.debian_suite import DebianInterpreter
from builder.ground.interpreters.tables import ArchiveSource, InterpreterTable
from builder.planning.stack import Interpreter, LoadedStack, unknown
from gracefarm import tables


def names(interpreters: Path) -> list[str]:
    """Interpreters in a folder, by version."""
    known = [path.parent.name for path in interpreters.glob("*/interpreter.toml")]
    return sorted(known, key=lambda name: (_minor(name), name))


def _minor(name: str) -> int:
    digits = name.removeprefix("3.").partition("-")[0].rstrip("t")
    return int(digits) if digits.isdigit() else 0


def load(interpreters: Path, name: str) -> Interpreter:
    """The interpreter called `name`.

    Raises:
        ConfigError: it does not exist (names the nearest), or its file does not fit the schema.
    """
    folder = interpreters / name
    if not (folder / "interpreter.toml").is_file():
        raise unknown("interpreter", name, interpreters, names(interpreters))
    table = tables.read(folder / "interpreter.toml", InterpreterTable)
    if isinstance(table.source, ArchiveSource):
        return ArchiveInterpreter(folder=folder, python=table.python, source=table.source)
    return DebianInterpreter(folder=folder, python=table.python, source=table.source)


def into(base: LoadedStack, interpreters: Path, name: str | None) -> LoadedStack:
    """The stack with the interpreter of that name; None: with the Python of its root.

    Raises:
        ConfigError: see `load`.
    """
    return base if name is None else replace(base, interpreter=load(interpreters, name))
