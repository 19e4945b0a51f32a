"""What a new recipe takes from a source tree: what it reads, what it guesses, and what it refuses."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from builder.drafting import licence, metadata, reading, recipe_text
from builder.drafting.findings import Findings
from builder.drafting.reading import Draft, StackFacts
from builder.planning.recipe import Recipe
from builder.planning.sources import SdistSource
from gracefarm.errors import SourceError

STACK = StackFacts(
    name="cu130",
    python="3.11",
    installed={"torch": "2.11.0", "setuptools": "81.0.0", "ninja": "1.13.2", "numpy": "2.4.6", "pybind11": "3.1.0"},
)
PYG = """
import os
import torch
from torch.utils.cpp_extension import CUDAExtension
ONLY = os.getenv("FORCE_ONLY_CUDA", "0") == "1"
FORCE = os.getenv("FORCE_CUDA", "0") == "1"
ARCHS = os.getenv("THING_CUDA_ARCHS", "80;90")
DOTTED = os.getenv("OTHER_CUDA_ARCH", "")
CUDAExtension("thing_cuda", ["csrc/a.cu"])
"""


def write(tree: Path, **files: str) -> Path:
    """A source tree; `__` in a name is `/`, and `_dot_` is `.`."""
    for name, text in files.items():
        place = tree / name.replace("__", "/").replace("_dot_", ".")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    return tree


def drafted(tree: Path, name: str = "thing") -> Draft:
    return reading.draft(tree, name, metadata.read(tree), STACK)


def as_recipe(draft: Draft) -> Recipe:
    source = SdistSource(kind="sdist", name=draft.name, version="1.0", sha256="a" * 64)
    return Recipe.model_validate(tomllib.loads(recipe_text.recipe_toml(draft, "1.0", "text", "MIT", [], source)))


def test_what_a_build_without_a_gpu_needs_is_set_and_says_where_it_comes_from(tmp_path: Path) -> None:
    draft = drafted(write(tmp_path, setup_dot_py=PYG, csrc__a_dot_cu=""))
    assert draft.environment == {"FORCE_ONLY_CUDA": "1", "THING_CUDA_ARCHS": "{sm}", "OTHER_CUDA_ARCH": "{sm_dotted}"}
    assert draft.imports == ["torch", "thing", "thing_cuda"]
    (cuda,) = draft.findings.of("build.cuda")
    assert (cuda.read, cuda.origin) == (True, "setup.py:9")
    (memory,) = draft.findings.of("build.memory_per_job")
    assert not memory.read
    made = as_recipe(draft)
    assert not made.build.rust
    assert made.build.environment == draft.environment
    assert made.build.cuda


def test_what_the_build_requires_is_listed_and_what_contradicts_the_stack_is_replaced(tmp_path: Path) -> None:
    pyproject = """
[build-system]
requires = [
    "setuptools<81", "torch>=2.7,<2.8", "cython>=3; implementation_name != 'pypy'", "cffi; implementation_name == 'pypy'",
    "ninja"]
"""
    draft = drafted(write(tmp_path, pyproject_dot_toml=pyproject, a_dot_pyx=""))
    assert draft.requires == ["cython>=3"]
    assert not draft.cuda
    made = as_recipe(draft)
    text = (tmp_path / "pyproject.toml").read_text()
    for substitution in made.substitutions:
        assert text.count(substitution.find) == 1
        text = text.replace(substitution.find, substitution.replace)
    assert tomllib.loads(text)["build-system"]["requires"][:2] == ["setuptools", "torch"]
    assert [value.read for value in draft.findings.of("substitutions")] == [False, False]


def test_an_import_of_the_build_script_that_nothing_declares_is_listed_or_told(tmp_path: Path) -> None:
    script = "from Cython.Build import cythonize\nimport numpy, odd_helper\nimport local\n"
    draft = drafted(write(tmp_path, setup_dot_py=script, local_dot_py="", a_dot_pyx=""))
    assert draft.requires == ["cython"]
    (warning,) = draft.findings.warnings
    assert warning.startswith("setup.py:2 imports odd_helper")


def test_a_package_of_maturin_requires_rust_and_a_missing_cargo_lock_is_told(tmp_path: Path) -> None:
    pyproject = '[build-system]\nrequires = ["maturin>=1,<2"]\nbuild-backend = "maturin"\n'
    draft = drafted(write(tmp_path, pyproject_dot_toml=pyproject, src__lib_dot_rs=""))
    assert as_recipe(draft).build.rust
    (rust,) = draft.findings.of("build.rust")
    assert (rust.read, rust.origin) == (True, "pyproject.toml:2, which requires maturin")
    assert [warning for warning in draft.findings.warnings if "has no Cargo.lock" in warning]
    draft = drafted(write(tmp_path, Cargo_dot_lock=""))
    assert not [warning for warning in draft.findings.warnings if "Cargo.lock" in warning]


def test_cmake_is_told_to_take_cuda_where_its_option_is_off(tmp_path: Path) -> None:
    pyproject = '[build-system]\nrequires = ["scikit-build-core"]\nbuild-backend = "scikit_build_core.build"\n'
    cmake = 'cmake_minimum_required(VERSION 3.20)\noption(THING_CUDA "thing: use CUDA" OFF)\n'
    draft = drafted(write(tmp_path, pyproject_dot_toml=pyproject, inner__CMakeLists_dot_txt=cmake, a_dot_cu=""))
    assert draft.environment == {"CMAKE_ARGS": "-DTHING_CUDA=ON"}
    assert "inner/CMakeLists.txt:2" in draft.findings.of("build.environment")[0].origin


def test_requests_for_90a_and_sources_of_hopper_are_seen(tmp_path: Path) -> None:
    script = 'flags = ["-gencode", "arch=compute_90a,code=sm_90a"]\n'
    draft = drafted(write(tmp_path, setup_dot_py=script, csrc__hopper__a_dot_cu="", csrc__b_dot_cu=""))
    assert draft.sm_extra == {"*hopper*": ["90a"]}
    assert {(value.value, value.origin) for value in draft.findings.of("request")} == {("90a", "setup.py:1")}
    assert drafted(write(tmp_path / "other", a_dot_cu="")).sm_extra == {}


def test_formats_of_numbers_are_no_requests_for_architectures(tmp_path: Path) -> None:
    script = 'ARCHS = "9.0a"\nprint(f"{1.0:20.2f} {2.0: <20.2f}", "{:8.2f} %8.2f")\n'
    draft = drafted(write(tmp_path, setup_dot_py=script, a_dot_cu=""))
    assert {(value.value, value.origin) for value in draft.findings.of("request")} == {("90a", "setup.py:1")}


def test_a_source_without_what_it_compiles_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "setup.py").write_text(PYG)
    with pytest.raises(SourceError, match=r"it lacks csrc/a.cu, which setup.py:9 compiles") as refused:
        drafted(tmp_path)
    assert "--git" in refused.value.remedy
    (tmp_path / "setup.py").write_text('folders = ("third-party/cutlass/include",)\n')
    with pytest.raises(SourceError, match=r"it lacks third-party/cutlass/include, which setup.py:1 names"):
        drafted(tmp_path)


def test_missing_submodules_are_told(tmp_path: Path) -> None:
    modules = '[submodule "x"]\n\tpath = third_party/x\n\turl = https://example.org/x\n'
    draft = drafted(write(tmp_path, _dot_gitmodules=modules, a_dot_c=""))
    assert draft.findings.warnings == ["submodule third_party/x is not in the source (.gitmodules:2)"]


BSD = "Redistribution and use in source and binary forms\n3. Neither the name of"
APACHE = "Apache License\n Version 2.0, January 2004"
CLASSIFIER = "Classifier: License :: OSI Approved ::"


@pytest.mark.parametrize(
    ("info", "text", "spdx", "origin"),
    [
        ("License-Expression: MIT", "", "MIT", "PKG-INFO:2"),
        (f"License: UNKNOWN\n{CLASSIFIER} MIT License", "", "MIT", "PKG-INFO:3"),
        (f"{CLASSIFIER} BSD License", BSD, "BSD-3-Clause", "the text of LICENSE"),
        ("License: Apache Software License 2.0", APACHE, "Apache-2.0", "the text of LICENSE"),
        ("Name: thing", "All rights reserved.", "LicenseRef-unknown", ""),
    ],
)
def test_the_licence_is_read_where_it_is_named_else_by_the_words_of_its_text(
    tmp_path: Path, info: str, text: str, spdx: str, origin: str
) -> None:
    write(tmp_path, PKGINFO=f"Metadata-Version: 2.4\n{info}\n\ndescription\n", LICENSE=text)
    (tmp_path / "PKGINFO").rename(tmp_path / "PKG-INFO")
    findings = Findings()
    assert licence.find(tmp_path, metadata.read(tmp_path), findings) == spdx
    (value,) = findings.of("license")
    assert (value.read, value.origin if value.read else "") == (bool(origin), origin)


def test_licence_texts_of_code_of_others_are_listed(tmp_path: Path) -> None:
    write(tmp_path, LICENSE="x", third_party__cutlass__LICENSE_dot_txt="x", vendor__LICENSE="x", docs__LICENSE="x")
    assert licence.vendored(tmp_path) == ["third_party/cutlass/LICENSE.txt", "vendor/LICENSE"]
