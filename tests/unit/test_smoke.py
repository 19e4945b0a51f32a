"""The trap of the smoke test: what lies beside the driver is not what was installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from builder import smoke
from builder.toolchains import sandbox_trial


def drive(folder: Path, module: str, *, safe: bool = True) -> subprocess.CompletedProcess[str]:
    """The driver's own command, with this Python and `folder` in the places of the sandbox's."""
    smoke.prepare(folder, [module], None)
    words = [word.replace(sandbox_trial.WORKDIR, str(folder)) for word in smoke.driver([module], None)[1:]]
    if not safe:
        words.remove("-P")
    return subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True, timeout=60, check=False)


def test_a_module_that_only_lies_in_the_working_directory_is_not_found(tmp_path: Path) -> None:
    done = drive(tmp_path / "files", "only_a_decoy")
    assert done.returncode == 1
    assert "No module named 'only_a_decoy'" in done.stderr


def test_a_python_that_looks_in_the_working_directory_runs_into_the_decoy(tmp_path: Path) -> None:
    """Also where the module is installed, as any wheel under test is: pytest is."""
    done = drive(tmp_path / "files", "pytest", safe=False)
    assert done.returncode == 1
    assert "imported from the working directory" in done.stderr


def test_a_module_of_the_interpreter_is_not_the_wheels(tmp_path: Path) -> None:
    done = drive(tmp_path / "files", "json")
    assert done.returncode == 1
    assert "not from the installed wheel" in done.stderr


def test_an_installed_module_is_taken_from_where_it_is_installed(tmp_path: Path) -> None:
    done = drive(tmp_path / "files", "pytest")
    assert done.returncode == 0, done.stderr
    assert f"{sys.prefix}/lib/" in done.stdout
