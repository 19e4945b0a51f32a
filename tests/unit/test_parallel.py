"""setuptools' extension modules are compiled at the same time, by as many jobs as are allowed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

SETUP = """
from setuptools import Extension, setup
setup(name="many", version="1", ext_modules=[Extension(n, [f"{n}{i}.c" for i in range(3)]) for n in NAMES])
"""
COMPILER = """#!/bin/sh
case " $* " in *" -c "*) ;; *) exec gcc "$@" ;; esac
echo start >> trace
sleep 0.3
gcc "$@"
code=$?
echo end >> trace
exit $code
"""


def write(folder: Path, names: str) -> None:
    """A package with an extension module of three sources for each letter."""
    for name in names:
        for number in range(3):
            init = f"void *PyInit_{name}(void) {{ return 0; }}" if number == 0 else f"int {name}{number};"
            (folder / f"{name}{number}.c").write_text(init + "\n")
    (folder / "setup.py").write_text(SETUP.replace("NAMES", repr(names)))
    (folder / "compiler").write_text(COMPILER)
    (folder / "compiler").chmod(0o755)


def build(folder: Path, jobs: int) -> subprocess.CompletedProcess[str]:
    variables = {
        **os.environ,
        "CC": str(folder / "compiler"),
        "MAX_JOBS": str(jobs),
        "PYTHONPATH": str(REPOSITORY / "builder" / "data" / "setuptools"),
    }
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False, timeout=60)


def at_once(folder: Path) -> int:
    """The most compilations that ran at the same time."""
    running = most = 0
    for line in (folder / "trace").read_text().split():
        running += 1 if line == "start" else -1
        most = max(most, running)
    return most


@pytest.mark.parametrize(("names", "jobs", "most"), [("a", 3, 3), ("abc", 4, 4), ("ab", 1, 1)])
def test_as_many_objects_are_compiled_at_once_as_there_are_jobs(tmp_path: Path, names: str, jobs: int, most: int) -> None:
    write(tmp_path, names)
    done = build(tmp_path, jobs)
    assert done.returncode == 0, done.stdout + done.stderr
    assert at_once(tmp_path) == most
    assert sorted(library.name[0] for library in tmp_path.glob("*.so")) == list(names)
    count = 3 * len(names)
    assert (f"[{count}/{count}] " in done.stdout) is (jobs > 1), done.stdout


def test_a_unit_that_does_not_compile_ends_the_build_with_the_compilers_word(tmp_path: Path) -> None:
    write(tmp_path, "abc")
    (tmp_path / "b1.c").write_text("this is not C\n")
    failed = build(tmp_path, 2)
    assert failed.returncode != 0
    assert "b1.c:1" in failed.stderr
    assert "not compiled: b" in failed.stderr


SHARED = """
from setuptools import Extension, setup
setup(name="many", version="1", ext_modules=[Extension(n, ["same.c"], define_macros=[("INIT", f"PyInit_{n}")]) for n in "abc"])
"""


def test_extensions_of_one_source_do_not_overwrite_its_object(tmp_path: Path) -> None:
    """As three modules of one file with their own macros: each links what was compiled for it."""
    write(tmp_path, "")
    (tmp_path / "setup.py").write_text(SHARED)
    (tmp_path / "same.c").write_text("void *INIT(void) { return 0; }\n")
    done = build(tmp_path, 4)
    assert done.returncode == 0, done.stdout + done.stderr
    for library in tmp_path.glob("*.so"):
        symbols = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True).stdout
        assert [line.split()[-1] for line in symbols.splitlines() if "PyInit" in line] == [f"PyInit_{library.name[0]}"]
