"""Each field of the schemas of recipes and stacks changes the build id, or a table says why it does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomlkit

from builder.planning import packages, pins, recipe
from builder.planning.recipe import LoadedRecipe, Recipe
from builder.planning.stack import LoadedStack, Stack
from gracefarm.errors import ConfigError
from tests.unit.plan_kit import DIFFERENCES, FILE, GIT, SDIST, SHA, TREE, WHOLE, changed, id_of, project, whole

__all__ = ["project", "whole"]

TREES = [{"recipe": "timber", "path": "seed", "replaces": "b"}]

RECIPE_EXEMPT = {
    "summary": "for people",
    "stack": "a default of the command line; the stack itself is an input",
    "superseded": "for people",
    "known_bad": "such a build does not begin",
    "refuses": "such a build does not begin",
    "source.sha256_unknown": "the reason of a gap, which no build gets past",
    "source.accepted": "how a digest is known that a witness confirms; without one it is an input",
    "source.witness": "who confirms it",
    "files.sha256_unknown": "the reason of a gap, which no build gets past",
    "files.accepted": "how a digest is known that a witness confirms; without one it is an input",
    "files.witness": "who confirms it",
    "files.binfmt": "a kernel that does not start the target's programs is refused",
    "build.memory_per_job": "the number of jobs",
    "build.unit_memory": "which units run beside each other",
    "build.unit_seconds": "which unit starts first",
    "build.requires": "its lock is in the digest of the environment",
    "wheel.sm_supported": "others are refused",
    "wheel.bundled": "the audit's expectations, and",
    "wheel.may_publish": "what may be done with the wheel",
    "wheel.max_size": "its bound: the flow audits again what was judged by others",
    "smoke.imports": "what is tried; the flow tries again what was judged by others",
}
STACK_EXEMPT = {
    "name": "what the stack is called",
    "summary": "for people",
    "torch.cuda": "a check of the locked wheel, which the digest of the environment names",
    "glibc.x86_64": "another target's",
    "environment.requirements": "how the lock is made; what contradicts it is refused",
    "environment.resolved_before": "how the lock is made; the lock is the input",
    "environment.left_out": "how the lock is made",
    "environment.wheels.index": "where it is found; the digest says what it is",
    "environment.wheels.sha256_unknown": "the reason of a gap",
    "environment.wheels.accepted": "how a digest is known that a witness confirms; without one it is an input",
    "environment.wheels.witness": "who confirms it",
    "toolchain.requirements": "how the lock is made; what contradicts it is refused",
    "toolchain.debian.suite": "where packages are found; toolchain.lock says what they are",
    "toolchain.debian.component": "how the lock is made",
    "toolchain.debian.packages": "how the lock is made; one that it lacks is refused",
    "no_lock": "such a build does not begin",
    "container": "the sandbox reads none of it; what counts in a container has its own test",
    "root.suite": "where packages are found; root.lock says what they are",
    "root.hosts": "how the lock is made; a pair that it lacks is refused",
    "root.host": "how the lock is made; a package that it lacks is refused",
    "root.target": "how the lock is made",
    "root.cross": "how the lock is made",
    "root.native": "how the lock is made",
    "root.alone": "how the lock is made",
    "root.rust": "how the lock is made; root.lock says what a recipe with Rust uses",
}


def leaves(value: object, path: tuple[object, ...] = ()) -> Iterator[tuple[object, ...]]:
    """Paths of the single values of a table; an empty list counts as one, None as none."""
    if value is None:
        return
    if isinstance(value, dict) and value:
        for key, child in value.items():
            yield from leaves(child, (*path, key))
    elif isinstance(value, list) and value:
        for number, child in enumerate(value):
            yield from leaves(child, (*path, number))
    else:
        yield path


def of_a_witness(path: tuple[object, ...]) -> bool:
    """A value that has to be the digest that it stands beside."""
    return path[-1] == "witness" or (path[-3:-2] == ("witness",) and path[-1] == "value")


def field(path: tuple[object, ...]) -> str:
    """The path without positions."""
    return ".".join(str(step) for step in path if not isinstance(step, int))


def exempt(path: tuple[object, ...], known: dict[str, str]) -> bool:
    return any(field(path) == name or field(path).startswith(f"{name}.") for name in known)


def field_names(schema: dict[str, Any]) -> set[tuple[str, str]]:
    """Model and field of everything in a JSON schema."""
    tables = {schema["title"]: schema, **schema.get("$defs", {})}
    return {(title, name) for title, table in tables.items() for name in table.get("properties", {})}


@pytest.mark.parametrize("source", [GIT, SDIST, FILE], ids=["git", "sdist", "file"])
def test_each_field_of_a_recipe_changes_the_id_unless_it_is_listed_as_exempt(
    whole: tuple[LoadedRecipe, LoadedStack], source: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Which no recipe changes, and which read long locks.
    monkeypatch.setattr(packages, "root_digest", lambda *_: SHA)
    monkeypatch.setattr(pins, "environment_digest", lambda *_: SHA)
    monkeypatch.setattr(pins, "toolchain_digest", lambda *_: SHA)
    table = {**WHOLE, "source": source}
    one, base = dataclasses.replace(whole[0], data=Recipe.model_validate(table)), whole[1]
    before = id_of(one, base)
    for path in leaves(table):
        if path in (("source", "kind"), ("wheel", "sm_supported", 1)) or of_a_witness(path):
            continue  # no other value of that kind
        after = changed(table, path)
        if path[:2] == ("files", 0) and path[-1] == "url":
            after["wheel"]["bundled"][1]["origin"] = after["files"][0]["url"]
        if path == ("wheel", "bundled", 1, "origin"):
            continue  # has to be a file's URL
        differs = id_of(dataclasses.replace(one, data=Recipe.model_validate(after)), base) != before
        assert differs is not exempt(path, RECIPE_EXEMPT), field(path)


def test_the_recipe_of_these_tests_sets_every_field_of_the_schema() -> None:
    seen: set[tuple[str, str]] = set()
    gap = {"sha256": None, "sha256_unknown": "out of reach", "accepted": None, "witness": ()}
    for source in (GIT, SDIST, FILE, {**SDIST, **gap}, {**FILE, **gap}):
        note(Recipe.model_validate({**WHOLE, "source": source, "trees": TREES, "differences": DIFFERENCES}), seen)
    note(Recipe.model_validate(TREE), seen)
    assert seen == field_names(Recipe.model_json_schema())


def test_each_field_of_a_tree_and_of_what_takes_it_changes_the_takers_id(
    whole: tuple[LoadedRecipe, LoadedStack], project: Path
) -> None:
    one, base = whole

    def taker(trees: list[dict[str, str]], tree: dict[str, Any]) -> str:
        for name in ("timber", "timberx"):
            (project / "recipes" / name).mkdir(exist_ok=True)
            text = tomlkit.dumps({**tree, "name": name})
            (project / "recipes" / name / "recipe.toml").write_text(text)
        data = Recipe.model_validate({**WHOLE, "source": GIT, "trees": trees})
        return id_of(dataclasses.replace(one, data=data, from_source=(trees[0]["recipe"],)), base)

    before = taker(TREES, TREE)
    assert before == taker(TREES, TREE)
    for name, value in (("recipe", "timberx"), ("path", "other"), ("replaces", "c")):
        assert taker([{**TREES[0], name: value}], TREE) != before, name
    for path in leaves({name: TREE[name] for name in ("version", "license", "source", "tree")}):
        if path != ("source", "kind") and not of_a_witness(path) and not exempt(path, RECIPE_EXEMPT):
            assert taker(TREES, changed(TREE, path)) != before, path


def note(value: object, seen: set[tuple[str, str]]) -> None:
    """Model and field of everything that is set to its own value."""
    if isinstance(value, recipe.Table):
        for name in value.model_fields_set:
            if (found := getattr(value, name)) is not None:
                seen.add((type(value).__name__, name))
                note(found, seen)
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else ():
        note(child, seen)


def test_each_field_of_a_stack_changes_the_id_unless_it_is_listed_as_exempt(whole: tuple[LoadedRecipe, LoadedStack]) -> None:
    # Its recipe leaves the PTX to the stack.
    one, base = whole
    wheel = one.data.wheel.model_copy(update={"ptx": None})
    one = dataclasses.replace(one, data=one.data.model_copy(update={"wheel": wheel}))
    table = base.data.model_dump(mode="json")
    seen: set[tuple[str, str]] = set()
    note(Stack.model_validate(table), seen)
    seen.add(("Stack", "root_of"))  # stands for the root of another stack, whose fields are here
    assert seen == field_names(Stack.model_json_schema())
    before = id_of(one, base)
    for path in leaves(table):
        if of_a_witness(path):
            continue
        after = changed(table, path)
        try:
            differs = id_of(one, dataclasses.replace(base, data=Stack.model_validate(after))) != before
        except ConfigError:
            continue  # refused: the locks do not have it
        assert differs is not exempt(path, STACK_EXEMPT), field(path)
