"""The GPU test of a recipe with `--toolchain host`, on a machine without a GPU and with a fake GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from builder import smoke
from builder.box import gpu
from builder.planning import stack
from builder.planning.plan import Wanted
from builder.planning.stack import host_arch
from builder.toolchains.host import HostToolchain
from gracefarm.errors import SmokeError
from tests.integration.host_kit import Built, built, called, fake_torch, own
from tests.integration.test_build import record_of

__all__ = ["built", "own"]


def test_without_a_gpu_the_gpu_test_is_reported_as_not_run(
    built: Built, own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if gpu.devices():
        pytest.skip("this machine has a GPU")
    assert "smoke-gpu not run: no GPU" in built.done.said
    assert record_of(built.farm, "tiny_c")["gpu"] == smoke.GpuResult(status="not run", reason="no GPU").model_dump(mode="json")
    assert called(built.farm, monkeypatch, "show", "tiny_c") == (0, "")
    assert "gpu       not run: no GPU" in capsys.readouterr().out
    again = ("smoke", str(built.wheel), "--stack", "bare", "--recipe", "tiny_c", "--gpu", "--toolchain", "host")
    assert called(built.farm, monkeypatch, *again, "--environment", str(own)) == (0, "")
    assert capsys.readouterr().out.strip() == "not run: no GPU"


def gpu_trial(built: Built, place: Path, script: str) -> smoke.Trial:
    """The tiny C wheel over an environment, and a smoke_gpu.py of a text."""
    settings = built.farm.settings
    loaded = stack.load(settings.project / "stacks", "bare")
    toolchain = HostToolchain.find(loaded, Wanted(environment=place), cuda=False)
    ground = toolchain.lay(loaded, host_arch(), host_arch(), settings, cuda=False)
    folder = place.with_name("trial")
    folder.mkdir()
    (folder / "script.py").write_text(script)
    return smoke.Trial(
        wheel=built.wheel,
        imports=("torch", "tiny_c"),
        script=folder / "script.py",
        environment=toolchain.trial_environment(ground, emulated=False),
        folder=folder,
        memory=1 << 30,
        log=folder / "log.txt",
        repeat="builder smoke",
    )


@pytest.mark.parametrize(
    ("seen", "capability", "status", "reason"),
    [
        (True, "(9, 0)", "passed", ""),
        (True, "(8, 0)", "not run", "a fake GPU is sm_80, but the wheel is for sm_90"),
        (False, "(9, 0)", "not run", "no GPU"),
    ],
)
def test_the_gpu_test_runs_where_torch_sees_a_gpu_of_the_wheels_architecture(
    built: Built,
    own: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seen: bool,
    capability: str,
    status: str,
    reason: str,
) -> None:
    """With a fake GPU: device files that are none, and a torch that claims one."""
    monkeypatch.setattr(gpu, "devices", lambda: [Path("/dev/null")])
    place = fake_torch(own, tmp_path / "venv", version="2.11.0", cuda="13.0", seen=seen, capability=capability)
    found = smoke.run_gpu(gpu_trial(built, place, "import tiny_c\nprint(tiny_c.add(20, 22))\n"), ("90",))
    assert (found.status, found.reason) == (status, reason)
    assert found.script == ("42\n" if status == "passed" else None)


def test_a_wrong_result_on_the_gpu_fails_the_build(
    built: Built, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "devices", lambda: [Path("/dev/null")])
    place = fake_torch(own, tmp_path / "venv", version="2.11.0", cuda="13.0")
    with pytest.raises(SmokeError, match="failed its test on a fake GPU: AssertionError: off by one"):
        smoke.run_gpu(gpu_trial(built, place, "assert False, 'off by one'\n"), ("90",))
