"""A wheel of the stable ABI is built once, and serves every Python of the matrix that its tag names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from builder.flow import run
from builder.planning.stack import host_arch
from tests import projects
from tests.conftest import Farm

NATIVE = host_arch().value
SETUP = """
from setuptools import Extension, setup

setup(
    packages=["tiny_c"],
    ext_modules=[
        Extension("tiny_c._core", ["core.c"], py_limited_api=True, define_macros=[("Py_LIMITED_API", "0x030a0000")])
    ],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
"""
SELECTOR = f"python=3.13-trixie,root,3.10 target={NATIVE}"


def write(farm: Farm, setup: str) -> None:
    farm.recipe("tiny_c", projects.tree("tiny_c") | {"setup.py": setup}, name="tiny-c", smoke={"imports": ["tiny_c._core"]})


def cells(farm: Farm) -> dict[str, dict[str, str]]:
    """The matrix's rows by Python."""
    done = farm.run("matrix", "tiny_c", "--matrix", SELECTOR, "--json")
    assert done.code == 0, done.said
    return {row["python"]: row for row in json.loads(done.out)["cells"]}


def test_an_abi3_wheel_serves_the_other_pythons(farm: Farm) -> None:
    """The wheel of 3.11 is tagged cp310: it serves 3.13, whose interpreter is not even fetched, and 3.10, which is blocked."""
    write(farm, SETUP)
    (farm.settings.project / "stacks" / "bare" / "requirements-3.10.lock").unlink()
    with run.local_index(farm.settings) as (url, token):
        credentials = {"TWINE_USERNAME": "__token__", "TWINE_PASSWORD": token}
        command = ("build", "tiny_c", "--matrix", SELECTOR, "--publish", f"{url}/legacy/")
        first = farm.run(*command, **credentials)
    assert first.said.count(" jobs (") == 1, first.said
    assert "Python 3.13-trixie: tiny_c-1.0-cp310-abi3-manylinux" in first.said
    wheels = {Path(line).name for line in first.out.split()}
    assert len(wheels) == 1
    rows = cells(farm)
    assert {python: row["state"] for python, row in rows.items()} == {"3.10": "served", "3.11": "built", "3.13": "served"}
    assert {row["wheel"] for row in rows.values()} == wheels
    assert len({row["build_id"] for row in rows.values()}) == 1
    assert f"by {wheels.pop()}" in rows["3.13"]["reason"]

    write(farm, SETUP + "# another source\n")
    states = {python: row["state"] for python, row in cells(farm).items()}
    assert states == {"3.10": "blocked", "3.11": "not tried", "3.13": "not tried"}


@pytest.mark.slow
def test_a_wheel_for_one_python_serves_no_other(farm: Farm) -> None:
    farm.recipe("tiny_c", projects.tree("tiny_c"), name="tiny-c", smoke={"imports": ["tiny_c._core"]})
    assert farm.run("build", "tiny_c", "--target", NATIVE).code == 0
    assert {python: row["state"] for python, row in cells(farm).items()}["3.13"] == "not tried"
