"""`[build] requires` of a recipe: locked beside it, only in the build's environment."""

from __future__ import annotations

import tomllib
from pathlib import Path

from tests import projects
from tests.conftest import Farm
from tests.integration.test_build import record_of

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
