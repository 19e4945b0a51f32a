"""What the compiler cache goes by: the compilers, and nothing that a preprocessed text shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from builder.planning import plan, recipe, stack
from builder.planning.settings import Settings
from builder.planning.stack import Arch
from builder.toolchains import ccache, choice
from gracefarm.errors import ConfigError
from tests.unit.plan_kit import LOCK, NAME, RECIPE, ROOT, STACK, project, replace

__all__ = ["project"]


def made(project: Path, host: Arch = Arch.X86_64) -> plan.Plan:
    loaded = recipe.load(project / "recipes", NAME)
    return choice.make_plan(loaded, stack.load(project / "stacks", "cu130"), host, Arch.AARCH64)


NVCC = re.compile(r'(nvidia-cuda-nvcc==\S+ ; platform_machine == "x86_64" --hash=sha256:)[0-9a-f]{8}')


@pytest.mark.parametrize("path", [ROOT, LOCK], ids=["root", "nvcc"])
def test_other_compilers_find_no_object_of_the_old_ones(project: Path, path: str) -> None:
    before = ccache.compilers_digest(made(project))
    text = (project / path).read_text()
    changed = text.replace('version = "', 'version = "0:', 1) if path == ROOT else NVCC.sub(r"\g<1>00000000", text)
    assert changed != text
    (project / path).write_text(changed)
    assert ccache.compilers_digest(made(project)) != before


@pytest.mark.parametrize(
    "change",
    [replace(RECIPE, 'version = "1.7.0"', 'version = "1.7.1"'), replace(STACK, 'sm = ["90"]', 'sm = ["90", "100"]')],
    ids=["recipe", "sm"],
)
def test_what_text_and_arguments_show_leaves_the_cache_as_it_is(project: Path, change: object) -> None:
    before = ccache.compilers_digest(made(project))
    assert callable(change)
    change(project)
    assert ccache.compilers_digest(made(project)) == before


def test_another_host_has_other_objects(project: Path) -> None:
    assert ccache.compilers_digest(made(project)) != ccache.compilers_digest(made(project, Arch.AARCH64))


def test_a_recipe_has_a_folder_of_its_own_and_a_bound(project: Path, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home", project=project, compiler_cache="3GiB")
    binary, store = ccache.mounts(made(project), settings)
    assert store.source == tmp_path / "home" / "ccache" / NAME
    assert (binary.writable, store.writable) == (False, True)
    assert ccache.variables(made(project), settings)["CCACHE_MAXSIZE"] == "3072MiB"
    with pytest.raises(ConfigError, match="is not a size"):
        ccache.variables(made(project), settings.model_copy(update={"compiler_cache": "much"}))


@pytest.mark.parametrize("text", ["off", "OFF", "0", "no", "false"])
def test_the_setting_switches_it_off(tmp_path: Path, text: str) -> None:
    assert ccache.enabled(Settings(home=tmp_path, project=tmp_path))
    assert not ccache.enabled(Settings(home=tmp_path, project=tmp_path, compiler_cache=text))
