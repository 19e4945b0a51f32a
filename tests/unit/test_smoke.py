"""The trap of the smoke test: what lies beside the driver is not what was installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from builder import smoke
from builder.box import gpu
from builder.flow import judge
from builder.planning import recipe, stack
from builder.planning.ground import Ground
from builder.planning.settings import load
from builder.planning.stack import Arch, LoadedStack
from builder.smoke import GpuResult, Trial
from builder.toolchains import sandbox_trial
from builder.toolchains.choice import make_plan
from builder.toolchains.sandbox import SandboxToolchain
from tests.conftest import REPOSITORY
from tests.gaps_kit import put_back


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


@dataclass(frozen=True, kw_only=True)
class Recording(SandboxToolchain):
    """Lays nothing: notes the stack that it is asked for."""

    asked: list[LoadedStack]

    def lay(self, stack: LoadedStack, *_: object, cuda: bool) -> Ground:  # type: ignore[override]
        assert not cuda
        self.asked.append(stack)
        return Ground(root=Path("/"), environment=Path("/whole"), packages=Path("/"), compiler=None, title="")


def test_a_wheel_that_is_built_without_torch_meets_it_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's smoke_gpu.py compares with torch; where torch's digest is a gap, it is not run, and the record says why."""
    tried: list[Trial] = []
    monkeypatch.setattr(gpu, "devices", lambda: [Path("/dev/nvidia0")])
    monkeypatch.setattr(smoke, "run_gpu", lambda trial, *_: tried.append(trial) or GpuResult(status="passed"))
    shutil.copytree(REPOSITORY / "stacks", tmp_path / "stacks")
    put_back(tmp_path)
    loaded, ours = recipe.load(REPOSITORY / "recipes", "triton"), Recording(asked=[])
    ground = Ground(root=Path("/"), environment=Path("/plain"), packages=Path("/"), compiler=None, title="")
    trial = Trial(
        wheel=tmp_path,
        imports=("triton",),
        script=loaded.smoke_gpu_script,
        environment=ours.trial_environment(ground, emulated=False),
        folder=tmp_path,
        memory=0,
        log=tmp_path / "log.txt",
        repeat="builder smoke",
    )

    def gpu_result(stack_name: str, *, emulated: bool = False) -> GpuResult:
        plan = make_plan(loaded, stack.load(tmp_path / "stacks", stack_name), Arch.AARCH64, Arch.AARCH64, ours)
        environment = ours.trial_environment(ground, emulated=emulated)
        return judge.run_gpu(plan, replace(trial, environment=environment), load())

    assert gpu_result("cu124") == GpuResult(
        status="not run", reason="the test requires torch 2.4.0 for aarch64, but its digest is unknown"
    )
    assert (ours.asked, tried) == ([], [])
    assert gpu_result("cu130").status == "passed"
    (whole,) = ours.asked
    assert whole.takes("torch")
    assert whole.torch is not None
    assert tried.pop().environment == ours.trial_environment(replace(ground, environment=Path("/whole")), emulated=False)
    gpu_result("cu130", emulated=True)
    assert len(ours.asked) == 1
