"""The plan of a set and its set id: the hash of the build ids of its wheels, the other wheels, and its test."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property

from packaging.utils import canonicalize_name

from builder.planning import gaps, pins
from builder.planning.gaps import Gap
from builder.planning.pins import LockedWheel
from builder.planning.plan import Plan
from builder.planning.stack import Arch
from builder.sets.definition import LoadedSet
from builder.toolchains.choice import make_plan
from gracefarm.errors import ConfigError, PublishError
from gracefarm.files import sha256_file

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class SetPlan:
    """A set with the plans of its recipes, in the order in which they are built."""

    set: LoadedSet
    builds: tuple[Plan, ...]
    wheels: tuple[LockedWheel, ...]
    "The other wheels of the environment."

    @cached_property
    def set_id(self) -> str:
        """Hex sha256 of everything that can change the set's locks or its test."""
        data = self.set.data
        content = {
            "format": FORMAT,
            "builds": [plan.build_id for plan in self.builds],
            "wheels": [(wheel.name, wheel.version, wheel.sha256) for wheel in self.wheels],
            "target": data.target.value,
            "together": data.together.model_dump(mode="json"),
            "smoke": sha256_file(self.set.smoke_script) if self.set.smoke_script else None,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def gaps(self) -> list[Gap]:
        """Unknown digests of recipes, their trees and the stack, without duplicates."""
        recipes = [part.recipe for plan in self.builds for part in (plan, *plan.trees)]
        return [*(gap for recipe in recipes for gap in gaps.of_recipe(recipe)), *gaps.of_stack(self.set.stack)]


def plan_set(loaded: LoadedSet, host: Arch) -> SetPlan:
    """The plan of a set.

    Raises:
        PublishError: its stack has only headers.
        ConfigError: a lock is missing or does not match its TOML file, or the set's environment has another torch than its
            wheels are built against.
    """
    if loaded.stack.data.objects_only:
        # Wheels that were built with headers only cannot be loaded.
        raise PublishError(
            f"stack {loaded.stack.data.name} has only headers, so its wheels cannot be loaded and cannot be part of a set",
            remedy="set `stack` in set.toml to a stack with libraries",
        )
    wheels = pins.wheels(loaded.runtime, loaded.data.target)
    _check_torch(loaded, wheels)
    builds = tuple(make_plan(recipe, loaded.stack, host, loaded.data.target) for recipe in loaded.recipes)
    own = {canonicalize_name(plan.recipe.data.name) for plan in builds}
    for wheel in wheels:
        if wheel.name in own:
            raise ConfigError(
                f"set {loaded.data.name} builds {wheel.name}, but its lock also pins {wheel.name} {wheel.version}",
                remedy="add this package to left_out in set.toml, then lock the set again",
                repeat=loaded.runtime.lock_command,
            )
    return SetPlan(set=loaded, builds=builds, wheels=wheels)


def _check_torch(loaded: LoadedSet, wheels: tuple[LockedWheel, ...]) -> None:
    """Require the torch that the wheels are built against, since extensions depend on its exact build."""
    mine = next((wheel for wheel in wheels if wheel.name == "torch"), None)
    against = next((wheel for wheel in pins.wheels(loaded.stack, loaded.data.target) if wheel.name == "torch"), None)
    if against is not None and mine != against:
        have = f"torch {mine.version} (sha256 {mine.sha256[:16]}…)" if mine else "no torch"
        raise ConfigError(
            f"set {loaded.data.name} has {have}, but its wheels are built against torch {against.version} (sha256 "
            f"{against.sha256[:16]}…) of stack {loaded.stack.data.name}",
            remedy="require the stack's version of torch in set.toml, use the same `resolved_before` in set.toml and "
            "stack.toml, and lock the set and the stack again",
            repeat=loaded.runtime.lock_command,
        )
