"""Why a build id is another one: the inputs that changed, what else they rebuild, and how long that takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from builder.proof import record
from builder.proof.record import Record
from gracefarm.errors import ConfigError
from gracefarm.settings import Settings

_OWN = "recipe."
"Inputs of one recipe alone; every other input is shared by all that are built against the same stack."


@dataclass(frozen=True, kw_only=True)
class Change:
    """One input that differs; None where it is absent."""

    path: str
    before: object
    after: object


@dataclass(frozen=True, kw_only=True)
class Rebuild:
    """A recipe that a change rebuilds, with the seconds that its last success took."""

    recipe: str
    build_id: str
    seconds: float | None


def changes(before: object, after: object, path: str = "") -> Iterator[Change]:
    """The leaves in which two inputs differ, in the order of their paths."""
    if before == after:
        return
    left, right = _children(before), _children(after)
    if left is None or right is None:
        yield Change(path=path, before=before, after=after)
        return
    for key in sorted(left.keys() | right.keys()):
        yield from changes(left.get(key), right.get(key), f"{path}.{key}" if path else key)


def _children(value: object) -> Mapping[str, object] | None:
    """A table by its keys, a list of named tables by their names; anything else is one value."""
    if isinstance(value, dict):
        return value
    if isinstance(value, list) and value and all(isinstance(one, dict) and "name" in one for one in value):
        return {str(one["name"]): one for one in value}
    return None


def others(records: Sequence[Record], key: str, old: Record, found: Sequence[Change]) -> list[Rebuild]:
    """Other recipes whose last success stands on the old value of a shared input; `records` newest first."""
    shared = [one for one in found if not one.path.startswith(_OWN)]
    seen: set[str] = set()
    rebuilt = []
    for one in records:
        if one.recipe == key or one.recipe in seen or one.outcome != "built" or not _beside(one, old):
            continue
        seen.add(one.recipe)
        if any(value_at(one.inputs, change.path) == change.before is not None for change in shared):
            rebuilt.append(Rebuild(recipe=one.recipe, build_id=one.build_id, seconds=seconds(records, one)))
    return sorted(rebuilt, key=lambda one: one.recipe)


def _beside(one: Record, old: Record) -> bool:
    """Built against the same stack for the same target: a digest may be the same by chance of being absent."""
    return one.stack == old.stack and one.inputs.get("target") == old.inputs.get("target")


def value_at(inputs: Mapping[str, object], path: str) -> object:
    """The input at a path of `changes`, or None."""
    value: object = inputs
    for key in path.split("."):
        value = (_children(value) or {}).get(key)
    return value


def seconds(records: Sequence[Record], like: Record) -> float | None:
    """Wall seconds of the last success of a recipe, against the same stack for the same target; None: there was none."""
    return last_seconds(records, like.recipe, like.stack, str(like.inputs.get("target")))


def last_seconds(records: Sequence[Record], recipe: str, stack: str, target: str) -> float | None:
    """As `seconds`, of what was not built yet; `records` newest first."""
    for one in records:
        if (one.recipe, one.stack, one.inputs.get("target"), one.outcome) == (recipe, stack, target, "built"):
            return round(sum(stage.wall_s for stage in one.stages), 1)
    return None


def by_id(settings: Settings, recipe: str, prefix: str) -> Record:
    """The record of a build of the recipe by the start of its id.

    Raises:
        ConfigError: no record, or more than one, has such an id.
    """
    found = [one for one in record.all_of(settings, recipe) if one.build_id.startswith(prefix)]
    if len(found) != 1:
        known = ", ".join(one.build_id[:16] for one in record.all_of(settings, recipe)) or "none"
        raise ConfigError(
            f"{len(found)} builds of {recipe} on this machine have an id that starts with {prefix!r}",
            remedy=f"ids with a record here: {known}",
            repeat=f"builder why {recipe} ID ID",
        )
    return found[0]
