"""Sets as data: what is refused, in which order they are built, what enters their id, how their locks are rendered."""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from pathlib import Path

import pytest
from packaging.pylock import Pylock

from builder.planning.settings import Settings, load
from builder.planning.stack import Arch
from builder.sets import definition, locks, plan, staging
from builder.sets.set_record import Locked
from gracefarm.errors import ConfigError, PublishError, UsageError
from tests.gaps_kit import put_back

REPOSITORY = Path(__file__).parent.parent.parent


@pytest.fixture
def project(tmp_path: Path) -> Settings:
    """A copy of the committed recipes, stacks and sets that a test may damage."""
    for name in ("recipes", "stacks", "sets"):
        shutil.copytree(REPOSITORY / name, tmp_path / name)
    put_back(tmp_path)
    return load().model_copy(update={"project": tmp_path})


def edit(project: Settings, name: str, old: str, new: str) -> None:
    place = project.project / name
    text = place.read_text()
    assert old in text
    place.write_text(text.replace(old, new, 1))


def planned(project: Settings, name: str) -> plan.SetPlan:
    return plan.plan_set(definition.load(name, project), Arch.X86_64)


@pytest.mark.parametrize(
    "name", ["gh200-cu124", "gh200-cu130", "gh200-cu130-torch2.14", "x86_64-cu130", "x86_64-cu130-torch2.14"]
)
def test_every_digest_of_the_committed_sets_is_there_or_named_as_a_gap(project: Settings, name: str) -> None:
    made = planned(project, name)
    missing = [wheel for wheel in made.wheels if not re.fullmatch(r"[0-9a-f]{64}", wheel.sha256)]
    named = {gap.what for gap in made.gaps()}
    assert [
        f"{wheel.name} {wheel.version} for aarch64"
        for wheel in missing
        if f"{wheel.name} {wheel.version} for aarch64" not in named
    ] == []
    assert len(missing) == (1 if name == "gh200-cu124" else 0)
    assert len(named) == (2 if name == "gh200-cu124" else 0)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("gh200-cu130", ("2.11.0", "3.6.0", "0.26.0")),
        ("gh200-cu130-torch2.14", ("2.14.0", "3.8.0", "0.33.0")),
        ("x86_64-cu130", ("2.11.0", "3.6.0", "0.26.0")),
        ("x86_64-cu130-torch2.14", ("2.14.0", "3.8.0", "0.33.0")),
    ],
)
def test_a_lock_has_the_versions_that_were_asked_for_and_no_address(
    project: Settings, name: str, wanted: tuple[str, ...]
) -> None:
    versions = {wheel.name: wheel.version for wheel in planned(project, name).wheels}
    assert (versions["torch"], versions["triton"], versions["vllm"]) == wanted
    assert versions["cuda-python"].startswith("13.")  # 12.6 has the files of cuda-bindings, older ones
    assert "://" not in (REPOSITORY / "sets" / name / "requirements.lock").read_text()


@pytest.mark.parametrize("release", ["cu130", "cu130-torch2.14"])
def test_a_set_for_x86_64_has_the_versions_of_that_for_gh200_and_builds_nothing(project: Settings, release: str) -> None:
    ours, theirs = (planned(project, f"{nodes}-{release}") for nodes in ("x86_64", "gh200"))
    assert [(wheel.name, wheel.version) for wheel in ours.wheels] == [(wheel.name, wheel.version) for wheel in theirs.wheels]
    assert (ours.set.data.target, ours.builds) == (Arch.X86_64, ())
    assert {wheel.filename.rpartition("_")[2] for wheel in ours.wheels if wheel.filename} >= {"64.whl"}
    assert not [wheel.filename for wheel in ours.wheels if "aarch64" in (wheel.filename or "")]


def test_a_file_of_several_sets_is_there_once_and_the_others_link_to_it() -> None:
    copies: dict[bytes, list[str]] = {}
    for place in sorted((REPOSITORY / "sets").rglob("*")):
        if place.is_file() and not place.is_symlink():
            copies.setdefault(place.read_bytes(), []).append(str(place.relative_to(REPOSITORY)))
    assert [names for names in copies.values() if len(names) > 1] == []


def test_what_another_wheel_requires_is_built_first(project: Settings) -> None:
    edit(
        project, "sets/gh200-cu124/set.toml", '["triton", "flash_attn", "aphrodite"]', '["aphrodite", "flash_attn", "triton"]'
    )
    assert [loaded.key for loaded in definition.load("gh200-cu124", project).recipes] == ["flash_attn", "triton", "aphrodite"]


def test_the_tutorials_set_needs_no_archive_of_llvm_if_it_is_built_from_source(project: Settings) -> None:
    loaded = definition.load("gh200-cu124", project)
    archive = "https://oaitriton.blob.core.windows.net/"
    for names, words, needed in (((), "gh200-cu124", True), (("llvm",), "gh200-cu124 --llvm source", False)):
        chosen = loaded.with_trees(names)
        made = plan.plan_set(chosen, Arch.X86_64)
        assert any(gap.url.startswith(archive) for gap in made.gaps()) == needed
        assert [tree.recipe.key for build in made.builds for tree in build.trees] == list(names)
        assert chosen.words == words
    with pytest.raises(UsageError, match="no recipe of the set gh200-cu130 uses a tree of llvm"):
        definition.load("gh200-cu130", project).with_trees(("llvm",))


def test_recipes_that_require_each_other_are_refused(project: Settings) -> None:
    place = project.project / "recipes" / "triton" / "recipe.toml"
    place.write_text(
        place.read_text().replace("[smoke]", '[wheel.requires]\naphrodite-engine = "aphrodite-engine"\n\n[smoke]')
    )
    with pytest.raises(ConfigError, match=r"require each other: .*triton.* > .*aphrodite"):
        definition.load("gh200-cu124", project)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("summary =", "sumary =", "unknown key 'sumary'"),
        ('resolved_before = "2026-11-23"\n', "", "both requirements and resolved_before"),
        ('name = "gh200-cu130"', 'name = "other"', "`name` is 'other'"),
        ('"torch==2.11.0"', '"torch=2.11.0"', "requirements"),
        ('stack = "cu130"', 'stack = "cu13"', "unknown stack 'cu13'"),
        ('recipes = ["causal_conv1d"', 'recipes = ["causal_conv"', "unknown recipe 'causal_conv'"),
        ('stack = "cu130"', 'stack = "cu124"\ntarget = "x86_64"', "has no target x86_64"),
    ],
)
def test_a_set_that_cannot_be_meant_is_refused_with_a_sentence(project: Settings, old: str, new: str, words: str) -> None:
    edit(project, "sets/gh200-cu130/set.toml", old, new)
    with pytest.raises(ConfigError, match=re.escape(words)):
        definition.load("gh200-cu130", project)


def test_an_unknown_set_is_told_the_nearest(project: Settings) -> None:
    with pytest.raises(ConfigError) as error:
        definition.load("gh200-cu13", project)
    assert "gh200-cu130" in error.value.remedy


def test_another_torch_than_the_stacks_is_refused_though_its_version_is_the_same(project: Settings) -> None:
    place = project.project / "sets" / "gh200-cu130" / "requirements.lock"
    text, count = re.subn(r"^(torch==2\.11\.0 --hash=sha256:).{4}", r"\g<1>0000", place.read_text(), flags=re.MULTILINE)
    assert count == 1
    place.write_text(text)
    with pytest.raises(ConfigError, match=r"has torch 2\.11\.0 \(sha256 0000"):
        planned(project, "gh200-cu130")


def test_a_lock_that_has_our_own_wheel_too_is_refused(project: Settings) -> None:
    place = project.project / "sets" / "gh200-cu130" / "requirements.lock"
    place.write_text(place.read_text() + f"causal-conv1d==1.7.0 --hash=sha256:{'0' * 64}\n")
    with pytest.raises(ConfigError, match=r"builds causal-conv1d, but its lock also pins causal-conv1d 1\.7\.0"):
        planned(project, "gh200-cu130")


def test_a_lock_older_than_its_set_is_refused(project: Settings) -> None:
    edit(project, "sets/gh200-cu130/set.toml", "vllm==0.26.0", "vllm==0.27.0")
    with pytest.raises(ConfigError) as error:
        planned(project, "gh200-cu130")
    assert error.value.repeat == "builder lock gh200-cu130"


def test_no_set_of_a_stack_of_headers(project: Settings) -> None:
    shutil.copytree(REPOSITORY / "tests" / "stacks" / "cu124-headers", project.project / "stacks" / "cu124-headers")
    edit(project, "sets/gh200-cu124/set.toml", 'stack = "cu124"', 'stack = "cu124-headers"')
    with pytest.raises(PublishError, match="cannot be part of a set"):
        planned(project, "gh200-cu124")


def test_the_id_changes_with_a_build_a_wheel_and_a_test_and_with_nothing_else(project: Settings) -> None:
    seen = [planned(project, "gh200-cu130").set_id]
    for name, old, new in (
        ("sets/gh200-cu130/set.toml", '"vllm",', '"vllm", "einops",'),
        ("sets/gh200-cu130/smoke.py", "import json", "import json  # more"),
        ("recipes/causal_conv1d/recipe.toml", 'FORCE_BUILD = "TRUE"', 'FORCE_BUILD = "true"'),
    ):
        edit(project, name, old, new)
        seen.append(planned(project, "gh200-cu130").set_id)
    place = project.project / "sets" / "gh200-cu130" / "requirements.lock"
    place.write_text(re.sub(r"^(einops\S+ --hash=sha256:).{4}", r"\g<1>0000", place.read_text(), flags=re.MULTILINE))
    seen.append(planned(project, "gh200-cu130").set_id)
    assert len(set(seen)) == 5
    edit(project, "sets/gh200-cu130/set.toml", "summary = ", "# a comment\nsummary = ")
    assert planned(project, "gh200-cu130").set_id == seen[-1]


WHEELS = [
    Locked(name="causal-conv1d", version="1.7.0", filename="causal_conv1d-1.7.0-cp311-cp311-manylinux_2_34_aarch64.whl",
           sha256="1" * 64, own=True),
    Locked(name="engine", version="1.0", filename="engine-1.0-cp38-abi3-manylinux_2_28_aarch64.whl",
           sha256="2" * 64, own=True),
    Locked(name="pure", version="1.0+cu130", filename="pure-1.0+cu130-py3-none-any.whl", sha256="3" * 64),
]  # fmt: skip


def test_the_matrix_asks_for_our_wheels_by_python_and_architecture() -> None:
    assert staging.matrix(WHEELS) == ["causal-conv1d==1.7.0 cp311 aarch64", "engine==1.0", "pure==1.0+cu130"]


@pytest.mark.parametrize(
    "url",
    ["", "/", "/simple/", "/simple", "/gh200-cu130/simple/", "/legacy/", "/legacy", "/stage/gh200-cu130/legacy/"],
)
def test_any_address_of_the_index_will_do(url: str) -> None:
    at = locks.served(f"http://farm.test:8080/pypi{url}", "gh200-cu130")
    assert at.simple == "http://farm.test:8080/pypi/gh200-cu130/simple/"


def test_pylock_is_as_the_standard_has_it(project: Settings) -> None:
    at = locks.served("http://farm.test", "gh200-cu130")
    document = tomllib.loads(locks.pylock(definition.load("gh200-cu130", project), WHEELS, at))
    Pylock.from_dict(document).validate()
    assert document["packages"][2]["wheels"] == [
        {
            "name": "pure-1.0+cu130-py3-none-any.whl",
            "url": f"http://farm.test/files/{'3' * 64}/pure-1.0%2Bcu130-py3-none-any.whl",
            "hashes": {"sha256": "3" * 64},
        }
    ]
    assert json.dumps(document["environments"]) == json.dumps(['sys_platform == "linux" and platform_machine == "aarch64"'])
