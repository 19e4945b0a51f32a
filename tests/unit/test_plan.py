"""The build id: any input that can change the bytes changes it, nothing else does."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from builder import plan, recipe, stack
from builder.stack import Arch
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
    return plan.make(loaded, stack.load(project / "stacks", "cu130"), host, target).build_id


def replace(path: str, old: str, new: str) -> Callable[[Path], None]:
    def change(project: Path) -> None:
        text = (project / path).read_text()
        assert old in text
        (project / path).write_text(text.replace(old, new, 1))

    return change


def add_patch(project: Path) -> None:
    (project / "recipes" / NAME / "patches").mkdir()
    (project / "recipes" / NAME / "patches" / "0001-x.patch").write_text("--- a\n+++ b\n")


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
        replace(RECIPE, "summary =", "\n\nsummary   ="),
        replace(STACK, "summary = ", "# a comment\nsummary = "),
        replace(LOCK, "# Every wheel", "# All wheels"),
    ],
    ids=["comment", "jobs", "space", "stack comment", "lock comment"],
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
