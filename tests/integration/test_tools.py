"""CMake in the sandbox, and the commands for any wheel."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from builder.audit import Policy
from builder.audit.policy import asked_by
from builder.planning import recipe
from builder.planning.stack import Arch
from tests import projects
from tests.conftest import REPOSITORY, Farm, new_farm

CMAKE = """
import platform
said = subprocess.run(["uname", "-m"], check=True, capture_output=True, text=True).stdout.strip()
assert said == platform.machine() == "aarch64", (said, platform.machine())
subprocess.run(["cmake", "-S", ".", "-B", "/build/tmp/cmake"], check=True)
subprocess.run(["cmake", "--build", "/build/tmp/cmake"], check=True)
core = open("/build/tmp/cmake/libcore.so", "rb").read()
return wheel(wheel_directory, tag="cp311-cp311-linux_aarch64", files={"tiny/libcore.so": core})
"""
CMAKELISTS = """cmake_minimum_required(VERSION 3.20)
project(core C)
if(NOT CMAKE_SYSTEM_PROCESSOR STREQUAL "aarch64")
  message(FATAL_ERROR "CMake thinks that it builds for ${CMAKE_SYSTEM_PROCESSOR}")
endif()
add_library(core SHARED core.c)
"""


@pytest.fixture(scope="module")
def farm(shared_home: Path) -> Iterator[Farm]:
    """One for the module: nothing here changes what another test sees."""
    with new_farm(shared_home) as made:
        yield made


@pytest.fixture(scope="module")
def wheel(farm: Farm) -> Path:
    """A good wheel for aarch64 whose one library CMake has built."""
    files = projects.backend(CMAKE) | {"CMakeLists.txt": CMAKELISTS, "core.c": "int core(void) { return 7; }\n"}
    smoke = farm.recipe("tiny", files) / "smoke.py"
    smoke.write_text(
        "import ctypes, pathlib, tiny\nprint(ctypes.CDLL(str(pathlib.Path(tiny.__file__).with_name('libcore.so'))).core())\n"
    )
    done = farm.run("build", "tiny", "--target", "aarch64")
    assert done.code == 0, done.said
    return Path(done.out.strip())


def test_cmake_builds_for_the_target_with_native_compilers(farm: Farm, wheel: Path) -> None:
    shown = json.loads(farm.run("show", "tiny", "--json").out)
    assert shown["smoke"]["script"] == "7\n"
    assert "_aarch64.whl" in wheel.name


def test_audit_takes_anybodys_wheel_and_says_no_by_exit_code(farm: Farm, wheel: Path, tmp_path: Path) -> None:
    done = farm.run("audit", str(wheel), "--stack", "bare", "--json")
    verdicts = {verdict["gate"]: verdict["status"] for verdict in json.loads(done.out.splitlines()[-1])}
    assert done.code == 0, done.said
    assert verdicts["elf-machine"] == verdicts["symbols"] == "passed"
    false = tmp_path / "tiny-1.0-cp311-cp311-manylinux_2_17_x86_64.whl"
    false.write_bytes(wheel.read_bytes())
    refused = farm.run("audit", str(false), "--stack", "bare")
    assert refused.code == 30
    assert "elf-machine" in refused.said


def test_audit_asks_for_no_cuda_compiler_where_there_is_no_device_code(farm: Farm, wheel: Path) -> None:
    """A stack whose toolchain is only CMake."""
    stacks = farm.settings.project / "stacks"
    shutil.copytree(stacks / "bare", stacks / "plain")
    place = stacks / "plain/stack.toml"
    text = place.read_text().replace('name = "bare"', 'name = "plain"', 1)
    assert "requirements = []" in text
    place.write_text(text.replace("requirements = []", 'requirements = ["packaging"]', 1))
    done = farm.run("audit", str(wheel), "--stack", "plain")
    assert (done.code, "has no CUDA device code" in done.said) == (0, True), done.said


def test_audit_asks_for_what_a_recipe_declares(farm: Farm, wheel: Path, tmp_path: Path) -> None:
    """A tool that the recipe declares is a graft in a foreign wheel; another version is not a fault of a foreign wheel."""
    other = tmp_path / wheel.name
    info = "tiny-1.0.dist-info/RECORD"
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(other, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, data + (b"tiny/bin/ptxas,sha256=" + _digest(b"tool") + b",4\n" if name == info else b""))
        new.writestr("tiny/bin/ptxas", b"tool")
    bundled = {"bundled": [{"path": "tiny/bin/ptxas", "origin": "source", "license": "MIT"}]}
    farm.recipe("declares", {}, name="tiny", wheel=bundled)
    farm.recipe("newer", {}, name="tiny", version="1.1", wheel=bundled)
    alone = farm.run("audit", str(other), "--stack", "bare")
    assert (alone.code, "tiny/bin/ptxas is third-party" in alone.said) == (30, True), alone.said
    declared = farm.run("audit", str(other), "--stack", "bare", "--recipe", "declares")
    assert (declared.code, "the recipe declares all third-party files (1)" in declared.said) == (0, True), declared.said
    newer = farm.run("audit", str(other), "--stack", "bare", "--recipe", "newer")
    assert (newer.code, "1.1" in newer.said) == (30, True), newer.said


def _digest(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=")


def test_what_a_recipe_declares_of_device_code_is_asked_for_too() -> None:
    anybodys = Policy(target=Arch.AARCH64, glibc="2_34", sm=("90",))
    engine = asked_by(recipe.load(REPOSITORY / "recipes", "aphrodite").data, anybodys)
    assert engine.needs_cubins
    assert ("90a",) in engine.sm_extra.values()
    triton = asked_by(recipe.load(REPOSITORY / "recipes", "triton").data, anybodys)
    assert (triton.sm, triton.needs_cubins) == (None, False)
    assert any(file.path.endswith("/ptxas") for file in triton.bundled)


def test_smoke_imports_a_wheel_or_says_why_not(farm: Farm, wheel: Path) -> None:
    done = farm.run("smoke", str(wheel), "--stack", "bare", "--import", "tiny")
    assert done.code == 0, done.said
    assert "/env/lib/python3.11/site-packages/tiny/__init__.py" in done.out
    missing = farm.run("smoke", str(wheel), "--stack", "bare", "--import", "tiny.absent")
    assert missing.code == 31
    assert "No module named 'tiny.absent'" in missing.said


def test_a_file_that_is_no_wheel_is_one_sentence(farm: Farm, tmp_path: Path) -> None:
    path = tmp_path / "thing.whl"
    path.write_bytes(b"nothing")
    done = farm.run("audit", str(path), "--stack", "bare")
    assert done.code == 24
    assert "Traceback" not in done.err
