"""The definition of a set: sets/NAME/set.toml, with requirements.lock if it does not run in the stack's environment."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Self

from packaging.utils import canonicalize_name
from pydantic import Field, model_validator

from builder.planning import recipe, stack
from builder.planning.recipe import LoadedRecipe
from builder.planning.settings import Settings
from builder.planning.stack import Arch, Environment, LoadedStack, RequirementText
from gracefarm import tables
from gracefarm.errors import ConfigError, UsageError
from gracefarm.tables import Table


class Together(Table):
    """The test of all wheels of the set in one clean environment."""

    imports: tuple[str, ...] = Field(min_length=1)
    "Modules to import, including extension modules. If the set's folder has a smoke.py, it runs after the imports"
    commands: tuple[tuple[str, ...], ...] = ()
    "Commands that must succeed, for example `[['aphrodite', 'run', '--help']]`"


class WheelSet(Table):
    """set.toml."""

    name: str
    "Name of the set. It must be the name of the folder"
    summary: str = ""
    "Description in one line"
    stack: str
    "Stack that the wheels are built against"
    target: Arch = Arch.AARCH64
    "Architecture of the wheels"
    recipes: tuple[str, ...] = ()
    (
        "Recipes whose wheels are built. If one of these wheels requires another one, the required wheel is built first. "
        "Without this key, all wheels come from the Python index"
    )
    requirements: tuple[RequirementText, ...] = ()
    (
        "Packages that the set installs. `builder lock` resolves them, together with the packages that they require. Without "
        "this key, the set has the packages of the stack's environment"
    )
    resolved_before: str | None = None
    "`builder lock` ignores files that were uploaded after this date (RFC 3339). Required with `requirements`"
    left_out: tuple[str, ...] = ()
    "Packages that the lock omits, although other packages require them"
    together: Together
    "Test of all wheels together"

    @model_validator(mode="after")
    def _dated(self) -> Self:
        if bool(self.requirements) != bool(self.resolved_before):
            msg = "give both requirements and resolved_before, or neither: the date makes the lock reproducible"
            raise ValueError(msg)
        return self


@dataclass(frozen=True, kw_only=True)
class LoadedSet:
    """A set with its stack and its recipes, in the order in which they are built."""

    folder: Path
    data: WheelSet
    stack: LoadedStack
    recipes: tuple[LoadedRecipe, ...]
    from_source: tuple[str, ...] = ()
    "Recipes whose trees replace downloads."

    @property
    def words(self) -> str:
        """Its name and options on the command line."""
        return self.data.name + "".join(f" --{name} source" for name in self.from_source)

    def with_trees(self, names: tuple[str, ...]) -> Self:
        """The set with trees of these recipes instead of downloads, in each of its recipes that has such a tree.

        Raises:
            UsageError: no recipe of the set has one of these trees.
        """
        for name in names:
            if not any(name in recipe.replaceable for recipe in self.recipes):
                raise UsageError(
                    f"no recipe of the set {self.data.name} uses a tree of {name} that can be built from source",
                    remedy=f"remove --{name} source",
                )
        recipes = (recipe.with_trees(tuple(name for name in names if name in recipe.replaceable)) for recipe in self.recipes)
        return replace(self, recipes=tuple(recipes), from_source=names)

    @cached_property
    def runtime(self) -> LoadedStack:
        """The environment of the set as a stack: the stack itself, or the stack with the set's lock."""
        if not self.data.requirements:
            return self.stack
        of = self.stack.data
        environment = Environment(
            requirements=self.data.requirements,
            resolved_before=self.data.resolved_before,
            left_out=self.data.left_out,
            wheels=of.environment.wheels,
        )
        changes = {
            "name": self.data.name,
            "glibc": {self.data.target: of.glibc[self.data.target]},
            "environment": environment,
            "toolchain": of.toolchain.model_copy(update={"requirements": (), "debian": None}),
            "root": self.stack.root.model_copy(update={"hosts": {}}),
            "root_of": None,
        }
        data = of.model_copy(update=changes)
        return replace(self.stack, folder=self.folder, data=data, root_stack=None, kind="set")

    @property
    def smoke_script(self) -> Path | None:
        """smoke.py, if the set has one."""
        place = self.folder / "smoke.py"
        return place if place.is_file() else None


def folder(settings: Settings) -> Path:
    """The folder of sets."""
    return settings.project / "sets"


def names(settings: Settings) -> list[str]:
    """Sets of this project, sorted."""
    return sorted(path.parent.name for path in folder(settings).glob("*/set.toml"))


def load(name: str, settings: Settings) -> LoadedSet:
    """The set `name`.

    Raises:
        ConfigError: it does not exist (names the nearest), its file does not fit the schema, it names a recipe or stack that
            does not exist, or its recipes require each other.
    """
    place = folder(settings) / name
    if not (place / "set.toml").is_file():
        raise stack.unknown("set", name, folder(settings), names(settings))
    data = tables.read(place / "set.toml", WheelSet)
    if data.name != name:
        raise ConfigError(
            f"{place / 'set.toml'}:1: `name` is {data.name!r}, which differs from the name of the set's folder",
            remedy="change `name` to the name of the folder",
        )
    base = stack.load(settings.project / "stacks", data.stack)
    if data.target not in base.data.glibc:
        raise ConfigError(
            f"stack {data.stack} has no target {data.target.value}",
            remedy=f"set `target` in set.toml to {' or '.join(sorted(arch.value for arch in base.data.glibc))}",
        )
    own = [recipe.load(settings.project / "recipes", key).against(base) for key in data.recipes]
    return LoadedSet(folder=place, data=data, stack=base, recipes=tuple(_in_order(own, name)))


def _in_order(own: Iterable[LoadedRecipe], name: str) -> list[LoadedRecipe]:
    """The recipes in the set's order, but requirements of others first."""
    by_name = {canonicalize_name(loaded.data.name): loaded for loaded in own}
    graph = {
        key: [
            wanted for text in loaded.data.wheel.requires if (wanted := canonicalize_name(text)) in by_name and wanted != key
        ]
        for key, loaded in by_name.items()
    }
    try:
        return [by_name[key] for key in TopologicalSorter(graph).static_order()]
    except CycleError as error:
        circle = " > ".join(map(str, error.args[1]))
        raise ConfigError(
            f"recipes of set {name} require each other: {circle}",
            remedy="correct `requires` of [wheel] in one of these recipes",
        ) from error
