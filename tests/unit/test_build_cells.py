"""`builder build --matrix`: a cell that cannot be built now does not hide the state of the other cells."""

from __future__ import annotations

from pathlib import Path

import pytest

from builder.cli import build
from builder.cli.matrix import plan_cell
from builder.cli.options import Aim
from builder.farm import worker
from builder.farm.cluster import Share
from builder.farm.job import of_plan
from builder.flow import room
from builder.flow.attempt import BuildOptions
from builder.planning.matrix import Cell
from builder.planning.settings import Settings
from builder.planning.stack import Arch
from builder.toolchains.choice import ToolchainChoice
from gracefarm.console import Console
from gracefarm.errors import ConfigError, DiskFullError
from tests.unit.plan_kit import LOCK, NAME, project

__all__ = ["project"]

AIM = Aim(stack=None, target="aarch64", on=ToolchainChoice())
FULL = DiskFullError("the build needs at least 9 GiB", remedy="free space there")


def cells() -> list[Cell]:
    return [Cell(recipe=NAME, stack="cu130", interpreter=None, target=Arch.AARCH64, sm=(sm,)) for sm in ("90", "100")]


def full(*_: object, **__: object) -> None:
    raise FULL


@pytest.fixture
def settings(project: Path, tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home", project=project)


def test_a_missing_lock_blocks_a_cell_of_changed(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    (settings.project / LOCK).unlink()
    assert build.planned(cells()[0], AIM, True, None, settings, Console()) == []
    assert f"skipped: {NAME} on cu130: " in " ".join(capsys.readouterr().err.split())
    with pytest.raises(ConfigError):
        [plan.build_id for plan in build.planned(cells()[0], AIM, False, None, settings, Console())]


def test_a_full_disk_fails_all_cells(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "require", full)
    monkeypatch.setattr(build, "build_one", lambda *_: pytest.fail("a build started"))
    failures = build.build_all(cells(), AIM, False, BuildOptions(), None, settings, Console())
    assert failures == [FULL, FULL]
    with pytest.raises(DiskFullError):
        build.build_all([NAME, NAME], AIM, False, BuildOptions(), None, settings, Console())


def test_a_worker_checks_its_disk_before_a_cell(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_cell(cells()[0], settings)
    share = Share(cpus=1, memory=1 << 30)
    job = of_plan(plan, BuildOptions(), share, code=worker.code.digest(), gracefarm="")
    monkeypatch.setattr(worker, "read", lambda _: settings)
    monkeypatch.setattr(worker.code, "unpack", lambda *_: settings.project)
    monkeypatch.setattr(room, "require", full)
    monkeypatch.setattr(worker.build, "build", lambda *_: pytest.fail("the build started"))
    answer = worker.answer_to(job, b"", Console(as_json=True))
    assert answer.failure is not None
    assert (answer.failure.cause, answer.unfit) == (FULL.cause, False)
