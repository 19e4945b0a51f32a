"""The disk space that builds need: what they share counts once, and what exists does not count."""

from __future__ import annotations

from pathlib import Path

from builder.flow import room
from builder.planning import pins, recipe, stack
from builder.planning.plan import Plan
from builder.planning.settings import Settings
from builder.planning.stack import Arch
from builder.toolchains.choice import ToolchainChoice
from tests.unit.plan_kit import NAME, project

__all__ = ["project"]


def plan_for(project: Path, sm: str) -> Plan:
    loaded = stack.load(project / "stacks", "cu130")
    return ToolchainChoice(sm=(sm,)).plan(recipe.load(project / "recipes", NAME), loaded, Arch.AARCH64)


def test_cells_with_one_root_and_environment_count_them_once(project: Path, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home", project=project)
    plans = [plan_for(project, "90"), plan_for(project, "100")]
    needs = room.needed(plans, settings, keep=False)
    assert needs == room.needed(plans[:1], settings, keep=False)
    assert needs[settings.home / "environments"] == room.TORCH + room.LIBRARIES
    assert needs[settings.home / "roots"] > needs[settings.home / "store"] > 0


def test_libraries_that_another_environment_has_do_not_count(project: Path, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home", project=project)
    plan = plan_for(project, "90")
    version = next(wheel.version for wheel in pins.wheels(plan.stack, plan.target) if wheel.name == "nvidia-cublas")
    site = settings.home / "environments" / "other" / "lib" / "python3.13" / "site-packages"
    info = site / f"nvidia_cublas-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "WHEEL").write_text("Tag: py3-none-manylinux_2_27_x86_64\n")
    assert room.needed([plan], settings, keep=False)[settings.home / "environments"] == room.TORCH + room.LIBRARIES
    (info / "WHEEL").write_text("Tag: py3-none-manylinux_2_27_aarch64\n")
    assert room.needed([plan], settings, keep=False)[settings.home / "environments"] == room.TORCH


def test_a_ground_that_exists_needs_no_space(project: Path, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home", project=project)
    plan = plan_for(project, "90")
    digests = plan.toolchain.digests(plan)
    (settings.home / "roots" / str(digests["root"])).mkdir(parents=True)
    (settings.home / "environments" / str(digests["environment"])).mkdir(parents=True)
    assert room.needed([plan], settings, keep=False).total() == 0
