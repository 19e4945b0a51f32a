"""What a failed build's log really says, and how many jobs run."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from builder.compiling import jobs, pep517
from builder.compiling.jobs import Jobs
from gracefarm.errors import CompileError, MemoryBoundError

TORCH_LOG = """running build_ext
[1/2] /cuda/bin/nvcc -c a.cu
FAILED: [code=1] /build/a.o
/cuda/bin/nvcc -c a.cu
a.cu(12): error: identifier "foo" is undefined
ninja: build stopped: subcommand failed.
Traceback (most recent call last):
  File "cpp_extension.py", line 2000, in _run_ninja_build
subprocess.CalledProcessError: Command '['ninja', '-v']' returned non-zero exit status 1.

The above exception was the direct cause of the following exception:

RuntimeError: Error compiling objects for extension
ERROR Backend subprocess exited when trying to invoke build_wheel
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (TORCH_LOG, 'a.cu(12): error: identifier "foo" is undefined'),
        ("x.c:1:10: fatal error: no.h: No such file or directory\nerror: command failed\n", "x.c:1:10: fatal error: no.h"),
        ("ld: a.o: undefined reference to `f'\ncollect2: error: ld returned 1 exit status\n", "undefined reference to `f'"),
        ("Traceback (most recent call last):\nModuleNotFoundError: No module named 'psutil'\nERROR Backend\n", "psutil"),
        ("FAILED: a.cu.o\nnvcc fatal   : Unsupported gpu architecture 'compute_1'\n", "nvcc fatal   : Unsupported gpu"),
        ("  CMake Error: no such folder\nmore\nRuntimeError: cmake failed\n", "CMake: no such folder"),
        ("ModuleNotFoundError: No module named 'jinja2'\nCMake Error at C.txt:3 (message):\n  failed\n", "named 'jinja2'"),
        ("CMake Error at C.txt:3 (project):\n\nnothing that is indented\n", "CMake Error at C.txt:3 (project):"),
        ("a.c:1: error: x\ncc1: fatal error: error writing to /tmp/x.s: No space left on device\n", "No space left on device"),
        ("../meson.build:2:0: ERROR: Could not invoke sanity check executable: Exec format error\nlast\n", "Could not invoke"),
        ("error[E0432]: unresolved import `pyo3`\nerror: could not compile `x`\n", "unresolved import `pyo3`"),
        ("something odd\n", "something odd"),
        ("", "the log is empty"),
    ],
)
def test_the_first_real_error_is_shown(tmp_path: Path, text: str, expected: str) -> None:
    log = tmp_path / "log.txt"
    log.write_text(text)
    assert expected in pep517.first_error(log)


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        (
            "find_package(NoSuchThing REQUIRED)",
            'provided by "NoSuchThing", but CMake did not find one. (at CMakeLists.txt:3 (find_package))',
        ),
        (
            "set(Git_FIND_REQUIRED 1)\nset(GIT_EXECUTABLE NO)\ninclude(FindGit)",
            "CMake: Could NOT find Git (missing: GIT_EXECUTABLE) (at ",
        ),
        (
            "set(CMAKE_C_COMPILER /no/such/cc)\nenable_language(C)",
            "CMake: The CMAKE_C_COMPILER: /no/such/cc is not a full path to an existing compiler tool. (at CMakeLists.txt:4",
        ),
    ],
)
def test_cmakes_reason_is_shown_and_not_its_place_alone(tmp_path: Path, statement: str, expected: str) -> None:
    (tmp_path / "CMakeLists.txt").write_text(f"cmake_minimum_required(VERSION 3.18)\nproject(t LANGUAGES NONE)\n{statement}\n")
    said = subprocess.run(["cmake", "-S", tmp_path, "-B", tmp_path / "build"], capture_output=True, text=True, check=False)
    assert said.returncode != 0
    log = tmp_path / "log.txt"
    log.write_text(f"{said.stdout}{said.stderr}Traceback (most recent call last):\nRuntimeError: cmake failed\n")
    assert expected in pep517.first_error(log)


def test_a_second_attempts_error_is_not_the_first_attempts(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("a.cu(1): error: killed half-way\n")
    start = log.stat().st_size
    with log.open("a") as stream:
        stream.write("b.cu(2): error: the real one\n")
    assert "b.cu(2)" in pep517.first_error(log, start)
    assert "a.cu(1)" in pep517.first_error(log)


def test_jobs_are_bounded_by_memory_and_say_so() -> None:
    found = jobs.plan(memory=3 << 30, memory_per_job="2GiB", wanted=None)
    assert found.count == 1
    assert "3.0 GiB" in found.reason
    assert "2GiB per job" in found.reason


def test_jobs_are_never_more_than_cores_or_than_asked_for() -> None:
    assert jobs.plan(memory=1 << 50, memory_per_job="1GiB", wanted=None).count == jobs.cores()
    assert jobs.plan(memory=1 << 50, memory_per_job="1GiB", wanted=1) == Jobs(
        count=1,
        reason=f"{jobs.cores()} cores; 1048576.0 GiB of memory with 1GiB per job allow 1048576 jobs; the requested limit is 1",
    )


def test_only_a_kill_by_memory_with_several_jobs_is_retried() -> None:
    assert pep517.fewer_jobs(MemoryBoundError("x"), 4) == 2
    assert pep517.fewer_jobs(MemoryBoundError("x"), 1) is None
    assert pep517.fewer_jobs(CompileError("x"), 4) is None
