"""The matrix: the cells (recipe, stack, Python, target, architectures) that a selector names, without loading recipes."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from packaging.version import InvalidVersion, Version
from pydantic import AfterValidator, Field

from builder.planning import device_code
from builder.planning.stack import Arch, Stack
from gracefarm import tables
from gracefarm.errors import UsageError
from gracefarm.tables import Table

FILE = "matrix.toml"
"In the project's top folder."
AXES = ("recipe", "stack", "python", "target", "sm", "torch", "cuda")
ROOT = "root"
"Value of the axis python: the Python of the stack's root."
_TARGETS = [arch.value for arch in Arch]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One wheel, by the names of its parts."""

    recipe: str
    stack: str
    interpreter: str | None
    "A folder of interpreters/; None: the Python of the stack's root."
    target: Arch
    sm: tuple[str, ...] | None
    "None: the stack's architectures."


@dataclass(frozen=True, kw_only=True)
class Known:
    """Recipes, stacks and interpreters of a project, from which a selector chooses."""

    recipes: Mapping[str, str]
    "Each recipe with its default stack."
    stacks: Mapping[str, Stack]
    interpreters: Sequence[str]
    "Sorted by version."


def _selector(text: str) -> str:
    try:
        for part in parts(text):
            parse(part)
    except UsageError as error:
        raise ValueError(error.cause) from error
    return text


class MatrixTable(Table):
    """matrix.toml."""

    keep_torch: int = Field(default=4, ge=1)
    (
        "Number of torch releases that are still in use, counted from the newest. `builder matrix --prune` lists the builds "
        "for all older releases, but removes nothing"
    )
    selectors: dict[str, Annotated[str, AfterValidator(_selector)]] = Field(default_factory=dict)
    "Selectors. The key is a name for the option `--matrix`, for example `default`"


def read(project: Path) -> MatrixTable:
    """The project's matrix.toml; an empty one if the file does not exist.

    Raises:
        ConfigError: it does not fit the schema.
    """
    return tables.read(project / FILE, MatrixTable) if (project / FILE).is_file() else MatrixTable()


def named(text: str, project: Path) -> str:
    """A selector from the command line: its text, or a name in matrix.toml.

    Raises:
        UsageError: there is no selector of that name.
    """
    if "=" in text or not text:
        return text
    selectors = read(project).selectors
    if text not in selectors:
        raise UsageError(
            f"{text!r} is neither a selector nor the name of a selector",
            remedy=f"write AXIS=VALUE, or a name from {FILE}: {', '.join(sorted(selectors)) or 'the file has no selectors'}",
        )
    return selectors[text]


def parts(text: str) -> list[str]:
    """Selectors that are joined with semicolons."""
    return text.split(";")


def parse(text: str) -> dict[str, tuple[str, ...]]:
    """Values by axis of a selector such as `python=3.10..3.14,3.14t target=aarch64,x86_64 sm=90+100`.

    Raises:
        UsageError: an axis is unknown, given twice or empty.
    """
    values: dict[str, tuple[str, ...]] = {}
    for word in text.split():
        axis, equals, given = word.partition("=")
        if axis not in AXES or not equals:
            raise UsageError(
                f"{word!r} in the selector is not AXIS=VALUES",
                remedy=f"write {axis}=VALUES" if axis in AXES else tables.nearest(axis, AXES, "axes"),
            )
        if axis in values:
            raise UsageError(f"the axis {axis} is given twice", remedy="join its values with a comma")
        values[axis] = tuple(value for value in given.split(",") if value)
        if not values[axis]:
            raise UsageError(f"the axis {axis} has no value", remedy=f"write {axis}=VALUE, or omit the axis")
    return values


def expand(text: str, known: Known, names: Sequence[str] = ()) -> list[Cell]:
    """The cells that a selector names. `names`: only these recipes; the axis `recipe` selects among them.

    Without an axis, its default applies: all recipes, the recipe's stack, the stack's Python and architectures, aarch64.
    Selectors joined with semicolons name the cells of all of them.

    Raises:
        UsageError: see `parse`; or a value is unknown (names the nearest), or there is no cell.
    """
    cells = list(dict.fromkeys(cell for part in parts(text) for cell in _cells(parse(part), known, names)))
    if not cells:
        raise UsageError(
            f"the selector {text!r} names no cell",
            remedy="correct its values; `builder list` shows the recipes, and the stacks with their torch and CUDA",
        )
    return cells


def only(cells: Sequence[Cell], text: str, known: Known) -> list[Cell]:
    """The cells that a selector names too; an absent axis keeps all cells.

    Raises:
        UsageError: see `parse`; or a value is unknown (names the nearest), or there is no cell.
    """
    axes = parse(text)
    kept = list(cells)
    if "recipe" in axes:
        recipes = {_known(value, "recipe", known.recipes) for value in axes["recipe"]}
        kept = [cell for cell in kept if cell.recipe in recipes]
    if axes.keys() & {"stack", "torch", "cuda"}:
        stacks = _stacks(axes, known, "")
        kept = [cell for cell in kept if cell.stack in stacks]
    if "python" in axes:
        pythons = _pythons(axes["python"], known.interpreters)
        kept = [cell for cell in kept if cell.interpreter in pythons]
    if "target" in axes:
        targets = {_known(value, "target", _TARGETS) for value in axes["target"]}
        kept = [cell for cell in kept if cell.target in targets]
    if "sm" in axes:
        lists = [device_code.parse(value) for value in axes["sm"]]
        kept = [cell for cell in kept if cell.sm in lists]
    if not kept:
        raise UsageError(
            f"--only {text!r} matches none of the cells that --matrix selects",
            remedy="repeat the command without --only, or with axis values of the cells that `builder matrix` lists",
        )
    return kept


def shard(cells: Sequence[Cell], text: str) -> list[Cell]:
    """A part of the cells, as `2/3`: the second of three. Cells of one recipe and stack share objects and stay together.

    Raises:
        UsageError: the text is not such a part.
    """
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise UsageError(
            f"--shard {text!r} is not of the form I/N, with I from 1 to N",
            remedy="write I/N, such as 2/3 for the second of three parts",
        )
    groups = list(dict.fromkeys((cell.recipe, cell.stack) for cell in cells))
    own = set(groups[int(number) - 1 :: int(count)])
    return [cell for cell in cells if (cell.recipe, cell.stack) in own]


def _cells(axes: Mapping[str, Sequence[str]], known: Known, names: Sequence[str]) -> Iterator[Cell]:
    """The cells of one selector, from the values of its axes."""
    recipes = [_known(value, "recipe", known.recipes) for value in axes.get("recipe", names or tuple(known.recipes))]
    pythons = _pythons(axes.get("python", (ROOT,)), known.interpreters)
    targets = [Arch(_known(value, "target", _TARGETS)) for value in axes.get("target", (Arch.AARCH64,))]
    architectures = [device_code.parse(value) for value in axes["sm"]] if "sm" in axes else [None]
    for name in recipes:
        if not names or name in names:
            for stack_name in _stacks(axes, known, name):
                for python, target, sm in itertools.product(pythons, targets, architectures):
                    yield Cell(recipe=name, stack=stack_name, interpreter=python, target=target, sm=sm)


def _known(value: str, axis: str, known: Collection[str]) -> str:
    if value not in known:
        raise UsageError(f"unknown {axis} {value!r} in the selector", remedy=tables.nearest(value, sorted(known), f"{axis}s"))
    return value


def _pythons(values: Sequence[str], interpreters: Sequence[str]) -> list[str | None]:
    """Interpreters by name; a range selects the standalone ones in it, without free-threaded builds."""
    plain = [name for name in interpreters if name.removeprefix("3.").isdigit()]
    names: list[str | None] = []
    for value in values:
        first, dots, last = value.partition("..")
        if dots:
            start, end = (plain.index(_end(name, value, plain, interpreters)) for name in (first, last))
            _refuse_empty("python", value, empty=start > end)
            names += plain[start : end + 1]
        else:
            names.append(None if value == ROOT else _known(value, "python", [*interpreters, ROOT]))
    return list(dict.fromkeys(names))


def _end(name: str, value: str, plain: Sequence[str], interpreters: Sequence[str]) -> str:
    """The first or last Python of a range."""
    if name not in plain and name in (*interpreters, ROOT):
        raise UsageError(
            f"a range of Pythons must begin and end with a version, but {value} contains {name}",
            remedy=f"write a range such as {plain[0]}..{plain[-1]}, and append {name} after a comma",
        )
    return _known(name, "python", plain)


def _refuse_empty(axis: str, value: str, *, empty: bool) -> None:
    if empty:
        first, _, last = value.partition("..")
        raise UsageError(
            f"the range {axis}={value} is empty, since its end is lower than its beginning",
            remedy=f"write {axis}={last}..{first}",
        )


def _stacks(axes: Mapping[str, Sequence[str]], known: Known, recipe: str) -> list[str]:
    """Stacks by name that match the axes torch and cuda."""
    if "stack" in axes:
        names = [_known(value, "stack", known.stacks) for value in axes["stack"]]
    elif "torch" in axes or "cuda" in axes:
        names = list(known.stacks)
    else:
        return [known.recipes[recipe]]
    for axis in ("torch", "cuda"):
        if axis in axes:
            versions = {name: _version(of, axis) for name, of in known.stacks.items()}
            matching = {name for value in axes[axis] for name in _matching(versions, value, axis)}
            names = [name for name in names if name in matching]
    return names


def _version(of: Stack, axis: str) -> str | None:
    return of.cuda if axis == "cuda" else of.torch.version if of.torch is not None else None


def _matching(versions: Mapping[str, str | None], value: str, axis: str) -> list[str]:
    """The stacks with a version that equals the value, or is in the range `A..B`."""
    names = [name for name, version in versions.items() if _within(version, value, axis)]
    if not names:
        there = sorted({Version(version) for version in versions.values() if version is not None})
        raise UsageError(
            f"no stack has {axis} {value}",
            remedy=f"the stacks have these versions of {axis}: {', '.join(map(str, there)) or 'none'}",
        )
    return names


def _within(version: str | None, value: str, axis: str) -> bool:
    """Whether a version equals the value, or is in the range `A..B`."""
    first, dots, last = value.partition("..")
    try:
        start, end = Version(first), Version(last if dots else first)
    except InvalidVersion:
        example = "cuda=13.0 or cuda=12.4..13.0" if axis == "cuda" else f"{axis}=2.11.0 or {axis}=2.4..2.11"
        raise UsageError(
            f"{axis}={value} is neither a version nor a range", remedy=f"give a version or a range, such as {example}"
        ) from None
    _refuse_empty(axis, value, empty=start > end)
    if version is None:
        return False
    # 2.11 means 2.11.0 and 2.11.1.
    length = len(end.release)
    return start <= Version(version) and Version(version).release[:length] <= end.release
