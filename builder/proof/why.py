"""Why a build id has changed: the changed inputs, the other recipes that they rebuild, and the time of these builds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from builder.planning.settings import Settings
from builder.proof import record
from builder.proof.record import Likeness, Record
from gracefarm.errors import ConfigError

_OWN = "recipe."
"Prefix of inputs of one recipe; all other inputs are shared by the recipes of a stack."


@dataclass(frozen=True, kw_only=True)
class Change:
    """One input that differs; None: it does not exist."""

    path: str
    before: object
    after: object


@dataclass(frozen=True, kw_only=True)
class Rebuild:
    """A recipe that a change rebuilds, with the seconds of its last successful build."""

    recipe: str
    build_id: str
    seconds: float | None


@dataclass(frozen=True, kw_only=True)
class CellChange:
    """The effect of the current program, recipe and stack on a cell that was built before."""

    build: Record
    "Its newest successful build."
    build_id: str | None
    "The current build id; None: the cell cannot be planned any more."
    changes: tuple[Change, ...] = ()
    judged_again: bool = False
    "The wheel is kept, and the new gates and smoke tests judge it."
    reason: str = ""
    "Why it cannot be planned."

    @property
    def rebuilt(self) -> bool:
        """Whether a build would make another wheel."""
        return self.build_id not in (None, self.build.build_id)


def cells(records: Sequence[Record]) -> list[Record]:
    """The newest successful build of each cell; `records` newest first."""
    newest: dict[tuple[object, ...], Record] = {}
    for build in records:
        cell = (build.recipe, build.stack, build.toolchain, build.interpreter, build.inputs.get("target"))
        if build.outcome == "built":
            newest.setdefault((*cell, build.asked_sm, build.asked_ptx, build.asked_twin), build)
    return sorted(newest.values(), key=lambda build: (build.recipe, build.stack, build.interpreter or ""))


def changes(before: object, after: object, path: str = "") -> Iterator[Change]:
    """The leaves in which two inputs differ, sorted by path."""
    if before == after:
        return
    left, right = _children(before), _children(after)
    if left is None or right is None:
        yield Change(path=path, before=before, after=after)
        return
    for key in sorted(left.keys() | right.keys()):
        yield from changes(left.get(key), right.get(key), f"{path}.{key}" if path else key)


def _children(value: object) -> Mapping[str, object] | None:
    """The children of a table by key, of a list of named tables by name; None for other values."""
    if isinstance(value, dict):
        return value
    if isinstance(value, list) and value and all(isinstance(row, dict) and "name" in row for row in value):
        return {str(row["name"]): row for row in value}
    return None


def others(records: Sequence[Record], key: str, old: Record, changed: Sequence[Change]) -> list[Rebuild]:
    """Other recipes whose last successful build used the old value of a shared input; `records` newest first."""
    shared = [change for change in changed if not change.path.startswith(_OWN)]
    seen: set[str] = set()
    rebuilt = []
    for build in records:
        if build.recipe == key or build.recipe in seen or build.outcome != "built" or not _beside(build, old):
            continue
        seen.add(build.recipe)
        if any(value_at(build.inputs, change.path) == change.before is not None for change in shared):
            rebuilt.append(Rebuild(recipe=build.recipe, build_id=build.build_id, seconds=seconds(records, build)))
    return sorted(rebuilt, key=lambda rebuild: rebuild.recipe)


def _beside(build: Record, old: Record) -> bool:
    """Whether both are for the same stack and target, since absent digests are equal too."""
    return build.stack == old.stack and build.inputs.get("target") == old.inputs.get("target")


def value_at(inputs: Mapping[str, object], path: str) -> object:
    """The input at a path of `changes`, or None."""
    value: object = inputs
    for key in path.split("."):
        value = (_children(value) or {}).get(key)
    return value


def seconds(records: Sequence[Record], like: Record) -> float | None:
    """Wall seconds of the last successful build of a recipe with the same stack, target and architectures, or None."""
    return last_seconds(records, like.recipe, like.like)


def last_seconds(records: Sequence[Record], recipe: str, like: Likeness) -> float | None:
    """As `seconds`, for a cell that was not built yet; `records` newest first."""
    for build in records:
        if (build.recipe, build.like, build.outcome) == (recipe, like, "built"):
            return round(sum(stage.wall_s for stage in build.stages), 1)
    return None


def by_id(settings: Settings, recipe: str, prefix: str) -> Record:
    """The record of a build of the recipe by the start of its id.

    Raises:
        ConfigError: no record, or more than one, has such an id.
    """
    builds = [build for build in record.all_of(settings, recipe) if build.build_id.startswith(prefix)]
    if len(builds) != 1:
        known = ", ".join(build.build_id[:16] for build in record.all_of(settings, recipe)) or "none"
        raise ConfigError(
            f"{len(builds)} builds of {recipe} on this machine have an id that starts with {prefix!r}",
            remedy=f"give the first digits of exactly one of these build ids: {known}",
            repeat=f"builder why {recipe} ID ID",
        )
    return builds[0]
