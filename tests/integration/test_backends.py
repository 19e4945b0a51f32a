"""A project of each build backend, built for aarch64: its tools run as programs of this machine."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from tests.conftest import Farm
from tests.integration.test_build import record_of

CORE = """
#include <Python.h>
#include <stdlib.h>
static PyObject *answer(PyObject *self, PyObject *none) { return PyLong_FromLong(getenv("NO_SUCH_NAME") ? 0 : ANSWER); }
static PyMethodDef methods[] = {{"answer", answer, METH_NOARGS, ""}, {0}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "NAME", "", -1, methods};
PyMODINIT_FUNC PyInit_NAME(void) { return PyModule_Create(&module); }
"""
PYPROJECT = """
[build-system]
requires = [REQUIRES]
build-backend = "BACKEND"
[project]
name = "NAME"
version = "1.0"
"""
CMAKE = """
cmake_minimum_required(VERSION 3.30)
project(tiny_skbuild LANGUAGES C)
find_package(Python REQUIRED COMPONENTS Interpreter Development.Module)
Python_add_library(tiny_skbuild MODULE WITH_SOABI core.c)
target_compile_definitions(tiny_skbuild PRIVATE ANSWER=42)
install(TARGETS tiny_skbuild DESTINATION .)
"""
MESON = """
project('tiny_meson', 'c')
py = import('python').find_installation()
cc = meson.get_compiler('c')
tried = cc.run('int main(void) { return sizeof(long) == 8 && (char)-1 > 0 ? 0 : 1; }')
assert(tried.compiled() and tried.returncode() == 0, 'a program of aarch64 runs, where char has no sign')
py.extension_module('tiny_meson', 'core.c', c_args: '-DANSWER=42', install: true)
"""


def files(name: str, backend: str, requires: str, **more: str) -> dict[str, str | bytes]:
    pyproject = PYPROJECT.replace("NAME", name).replace("BACKEND", backend).replace("REQUIRES", requires)
    return {"pyproject.toml": pyproject, "core.c": CORE.replace("NAME", name), **more}


def build(farm: Farm, name: str, source: dict[str, str | bytes], requires: list[str]) -> Path:
    """The wheel of a recipe that requires these distributions to build, with its smoke test passed."""
    folder = farm.recipe(name, source, name=name, build={"cuda": False, "requires": requires})
    (folder / "smoke.py").write_text(f"import {name}\nprint({name}.answer())\n")
    locked = farm.run("lock", name)
    assert locked.code == 0, locked.said
    done = farm.run("build", name)
    assert done.code == 0, done.said
    assert record_of(farm, name)["smoke"]["script"] == "42\n"  # type: ignore[index]
    return Path(done.out.strip())


def log_of(farm: Farm, name: str) -> str:
    return farm.run("log", name).out


@pytest.mark.slow
def test_scikit_build_core_with_the_cmake_and_ninja_of_the_recipe(farm: Farm) -> None:
    source = files("tiny_skbuild", "scikit_build_core.build", '"scikit-build-core"', **{"CMakeLists.txt": CMAKE})
    wheel = build(farm, "tiny_skbuild", source, ["scikit-build-core", "cmake>=3.30,<4", "ninja"])
    assert wheel.name.startswith("tiny_skbuild-1.0-cp311-cp311-manylinux")
    # FindPython does not know the suffix of modules in a cross build. Python imports the module without it too.
    assert "tiny_skbuild.so" in zipfile.ZipFile(wheel).namelist()
    # The root's CMake is older than the project wants.
    assert "CMake 3.31" in log_of(farm, "tiny_skbuild")


@pytest.mark.slow
def test_meson_python_runs_programs_of_the_target_by_our_launcher(farm: Farm) -> None:
    source = files("tiny_meson", "mesonpy", '"meson-python"', **{"meson.build": MESON})
    wheel = build(farm, "tiny_meson", source, ["meson-python"])
    assert wheel.name.startswith("tiny_meson-1.0-cp311-cp311-manylinux")
    assert wheel.name.endswith("_aarch64.whl")


@pytest.mark.slow
def test_an_error_of_meson_is_the_cause(farm: Farm) -> None:
    source = files("broken", "mesonpy", '"meson-python"', **{"meson.build": "project('broken', 'c')\nno_such_function()\n"})
    farm.recipe("broken", source, build={"cuda": False, "requires": ["meson-python"]})
    assert farm.run("lock", "broken").code == 0
    done = farm.run("build", "broken")
    assert (done.code, "meson.build:2:0: ERROR: Unknown function" in done.said) == (21, True), done.said
