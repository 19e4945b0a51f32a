"""`[build] requires` of a recipe: locked beside it, only in the build's environment."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import projects
from tests.conftest import Farm
from tests.integration import fetch_kit
from tests.integration.fetch_kit import Server
from tests.integration.test_build import record_of
from tests.integration.test_stack_new import CPYTHON, of_pythons, publish

PYPROJECT = """
[build-system]
requires = ["setuptools", "cython>=3.1"]
build-backend = "setuptools.build_meta"
[project]
name = "tiny-cy"
version = "1.0"
"""
SETUP = """
from Cython.Build import cythonize
from setuptools import setup
setup(ext_modules=cythonize("tiny_cy.pyx"), script_args=None)
"""
FILES: dict[str, str | bytes] = {
    "pyproject.toml": PYPROJECT,
    "setup.py": SETUP,
    "tiny_cy.pyx": "def double(long number):\n    return 2 * number\n",
}


def build_id(farm: Farm, name: str) -> str:
    done = farm.run("plan", name)
    assert done.code == 0, done.said
    return done.out.partition("build id")[2].split()[0]


def test_all_unmet_requirements_are_in_one_message(farm: Farm) -> None:
    pyproject = PYPROJECT.replace('"cython>=3.1"', '"cython>=3.1", "wheel<0.1", "packaging"')
    farm.recipe("tiny_cy", FILES | {"pyproject.toml": pyproject}, name="tiny-cy", build={"cuda": False})
    done = farm.run("build", "tiny_cy")
    assert done.code == 21, done.said
    (error,) = [line for line in done.err.splitlines() if line.startswith("error:")]
    assert "requires 'cython>=3.1' (stack bare has no such package), 'wheel<0.1' (stack bare has 0." in error
    assert "packaging" not in error, "a requirement that the stack meets"
    assert done.said.endswith("repeat: builder lock tiny_cy")


def test_cython_of_one_recipe_changes_no_other(farm: Farm) -> None:
    farm.recipe("tiny_c", projects.tree("tiny_c"), name="tiny-c", smoke={"imports": ["tiny_c"]})
    farm.recipe("tiny_cy", FILES, name="tiny-cy", smoke={"imports": ["tiny_cy"]}, build={"cuda": False})
    recipe = farm.settings.project / "recipes" / "tiny_cy" / "recipe.toml"
    (recipe.parent / "smoke.py").write_text("import tiny_cy\nprint(tiny_cy.double(21))\n")
    other = build_id(farm, "tiny_c")

    done = farm.run("build", "tiny_cy")
    assert done.code == 21, done.said
    assert "the build of tiny-cy requires 'cython>=3.1' (stack bare has no such package)" in done.said
    assert "`requires` of [build]" in done.said

    table = tomllib.loads(recipe.read_text())
    table["build"]["requires"] = ["cython>=3.1,<3.2"]
    recipe.write_text("\n".join(f"{key} = {projects.toml(value)}" for key, value in table.items()) + "\n")
    done = farm.run("plan", "tiny_cy")
    assert done.code == 3, done.said
    assert "builder lock tiny_cy" in done.said
    done = farm.run("lock", "tiny_cy")
    assert done.code == 0, done.said
    lock = (recipe.parent / "requirements.lock").read_text()
    assert 'python_version == "3.13" and platform_machine == "aarch64"' in lock

    done = farm.run("build", "tiny_cy")
    assert done.code == 0, done.said
    assert Path(done.out.strip()).name.startswith("tiny_cy-1.0-cp311-cp311-manylinux")
    assert record_of(farm, "tiny_cy")["smoke"]["script"] == "42\n"  # type: ignore[index]
    assert build_id(farm, "tiny_c") == other

    # Another pin is another build, and a lock that recipe.toml has left behind is refused.
    before = build_id(farm, "tiny_cy")
    version = lock.partition("cython==")[2].split()[0]
    (recipe.parent / "requirements.lock").write_text(lock.replace(f"cython=={version}", "cython==3.1.0"))
    assert build_id(farm, "tiny_cy") != before
    (recipe.parent / "requirements.lock").write_text(lock.replace(f"cython=={version}", "cython==3.2.0"))
    done = farm.run("plan", "tiny_cy")
    assert done.code == 3, done.said
    assert "recipe.toml requires cython" in done.said


@pytest.fixture
def brittle(farm: Farm) -> Iterator[Server]:
    """An index without wheels of `brittle` for Python 3.13t, and on x86_64 for 3.12. The recipe `tiny` requires it to build.

    The stack `bare` has locks for Python 3.11, 3.12 and 3.13t.
    """
    for lock in (farm.settings.project / "stacks" / "bare").glob("requirements-*.lock"):
        if lock.name not in ("requirements-3.12.lock", "requirements-3.13t.lock"):
            lock.rename(lock.with_suffix(".hidden"))
    build = {"cuda": False, "requires": ["brittle", "pure"]}
    farm.recipe("tiny", projects.backend("return wheel(wheel_directory)"), build=build)
    with fetch_kit.running() as server:
        publish(server, "brittle", "1.0", (*of_pythons("311", "313", "314"), f"cp312-cp312-{CPYTHON[0]}"))
        publish(server, "pure", "1.0", ("py3-none-any",))
        yield server


def lock_tiny(farm: Farm, index: Server) -> projects.Done:
    return farm.run("lock", "tiny", GRACEFARM_PYTHON_INDEX=f"{index.url}/simple/")


def test_a_python_without_a_wheel_is_left_out_of_the_lock(farm: Farm, brittle: Server) -> None:
    done = lock_tiny(farm, brittle)
    assert done.code == 0, done.said
    reason = "brittle 1.0 has no wheel for Python 3.13t on aarch64, and no version with such a wheel meets the requirements"
    assert done.said.count("left out Python") == 3
    assert "left out Python 3.12 on x86_64: the requirements cannot be resolved for x86_64: " in done.said
    assert f"left out Python 3.13t on aarch64: {reason}" in done.said
    assert "left out Python 3.13t on x86_64: brittle 1.0 has no wheel" in done.said
    lock = farm.settings.project / "recipes" / "tiny" / "requirements.lock"
    text = lock.read_text()
    assert "# Pythons: 3.11, 3.12, 3.13t\n" in text
    assert f"# Left out: Python 3.13t on aarch64: {reason}\n" in text
    assert "\npure==1.0 --hash=" in text
    assert brittle.url not in text

    assert farm.run("plan", "tiny", "--python", "3.12").code == 0
    done = farm.run("matrix", "--matrix", "python=3.12,3.13t target=aarch64,x86_64", "--json")
    states = {(cell["python"], cell["target"]): cell["state"] for cell in json.loads(done.out)["cells"]}
    assert states == {
        ("3.12", "aarch64"): "not tried",
        ("3.12", "x86_64"): "blocked",
        ("3.13t", "aarch64"): "blocked",
        ("3.13t", "x86_64"): "blocked",
    }
    done = farm.run("plan", "tiny", "--python", "3.13t")
    assert done.code == 3, done.said
    assert f"error: tiny cannot be built for Python 3.13t on aarch64: {reason} remedy: use a different Python" in done.said


def test_a_python_that_the_stack_got_after_the_lock_requires_a_new_lock(farm: Farm, brittle: Server) -> None:
    assert lock_tiny(farm, brittle).code == 0
    hidden = farm.settings.project / "stacks" / "bare" / "requirements-3.14.hidden"
    hidden.rename(hidden.with_suffix(".lock"))
    done = farm.run("plan", "tiny", "--python", "3.14")
    assert done.code == 3, done.said
    assert "requirements.lock was written before Python 3.14 was added remedy: write the lock again with" in done.said
    assert done.said.endswith("repeat: builder lock tiny")
    assert lock_tiny(farm, brittle).code == 0
    assert farm.run("plan", "tiny", "--python", "3.14").code == 0


def test_a_requirement_without_a_wheel_for_any_python_is_an_error(farm: Farm, brittle: Server) -> None:
    for version in ("3.12", "3.13t"):
        (farm.settings.project / "stacks" / "bare" / f"requirements-{version}.lock").unlink()
    publish(brittle, "pure", "2.0", ("py3-none-any",), ("brittle>1",))
    recipe = farm.settings.project / "recipes" / "tiny" / "recipe.toml"
    recipe.write_text(recipe.read_text().replace('"pure"', '"pure>1"'))
    done = lock_tiny(farm, brittle)
    assert done.code == 3, done.said
    assert "error: the requirements cannot be resolved for aarch64: " in done.said
    assert "remedy: correct `requires` of [build] in recipe.toml" in done.said
    assert "left out" not in done.said
    assert not (recipe.parent / "requirements.lock").exists()
