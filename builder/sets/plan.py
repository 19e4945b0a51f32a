"""What a set will be, as one hash: the build ids of its own wheels, what they run with, and what must work together."""

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
    """A set, with the plans of its own wheels in the order in which they are built."""

    set: LoadedSet
    builds: tuple[Plan, ...]
    wheels: tuple[LockedWheel, ...]
    "What they run with."

    @cached_property
    def set_id(self) -> str:
        """Hex sha256 of everything that can change the set's locks or what is tested."""
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
        """Digests that are not known yet, of recipes and stack, each once."""
        return [*(gap for plan in self.builds for gap in gaps.of_recipe(plan.recipe)), *gaps.of_stack(self.set.stack)]


def plan_set(loaded: LoadedSet, host: Arch) -> SetPlan:
    """The plan of a set.

    Raises:
        PublishError: its stack has headers alone.
        ConfigError: a lock is absent or older than its TOML file, or what the set runs with has another torch than the one
            that its wheels are built against.
    """
    if loaded.stack.data.objects_only:
        # Headers make objects to look at: nothing of them can be loaded together.
        raise PublishError(
            f"stack {loaded.stack.data.name} has headers alone: what it builds cannot be loaded and is part of no set",
            remedy="build against a stack that has the libraries",
        )
    wheels = pins.wheels(loaded.runtime, loaded.data.target)
    _check_torch(loaded, wheels)
    builds = tuple(make_plan(recipe, loaded.stack, host, loaded.data.target) for recipe in loaded.recipes)
    own = {canonicalize_name(plan.recipe.data.name) for plan in builds}
    for wheel in wheels:
        if wheel.name in own:
            raise ConfigError(
                f"set {loaded.data.name} builds {wheel.name} and its lock has {wheel.name} {wheel.version} too",
                remedy="name it in left_out of set.toml, then lock again",
                repeat=loaded.runtime.lock_command,
            )
    return SetPlan(set=loaded, builds=builds, wheels=wheels)


def _check_torch(loaded: LoadedSet, wheels: tuple[LockedWheel, ...]) -> None:
    """Extensions are bound to the very torch that they were compiled against."""
    mine = next((wheel for wheel in wheels if wheel.name == "torch"), None)
    against = next((wheel for wheel in pins.wheels(loaded.stack, loaded.data.target) if wheel.name == "torch"), None)
    if against is not None and mine != against:
        have = f"{mine.version} (sha256 {mine.sha256[:16]}…)" if mine else "none"
        raise ConfigError(
            f"set {loaded.data.name} runs with torch {have}, its wheels are built against {against.version} "
            f"(sha256 {against.sha256[:16]}…) of stack {loaded.stack.data.name}",
            remedy="pin the stack's torch in requirements of set.toml, and lock both before the same date",
            repeat=loaded.runtime.lock_command,
        )
