"""CMake in the sandbox, and the commands for anybody's wheel."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import projects
from tests.conftest import Farm

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


@pytest.fixture
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
    verdicts = {one["gate"]: one["status"] for one in json.loads(done.out.splitlines()[-1])}
    assert done.code == 0, done.said
    assert verdicts["elf-machine"] == verdicts["symbols"] == "passed"
    false = tmp_path / "tiny-1.0-cp311-cp311-manylinux_2_17_x86_64.whl"
    false.write_bytes(wheel.read_bytes())
    refused = farm.run("audit", str(false), "--stack", "bare")
    assert refused.code == 30
    assert "elf-machine" in refused.said


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
