"""A wheel of the stable ABI is built once on a cluster too, and recipes without one are not held back for nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from builder.cli import build
from builder.cli.matrix import plan_cell, reports_of
from builder.cli.options import Aim
from builder.farm import run
from builder.farm.cluster import Cluster, Worker
from builder.flow.attempt import BuildOptions
from builder.planning.matrix import Cell
from builder.planning.plan import Plan
from builder.planning.settings import Settings, load
from builder.planning.stack import Arch, host_arch
from builder.proof import judges
from builder.proof.record import BuiltFile, Record
from builder.toolchains.choice import ToolchainChoice
from gracefarm.console import Console
from tests.conftest import REPOSITORY

AIM = Aim(stack=None, target="aarch64", on=ToolchainChoice())
URL = "http://index.example/legacy/"
FAILED = "failed"
RUNS = "runs"
FAILURE = {"kind": "farm", "exit_code": 51, "cause": "its worker died 4 times", "remedy": "look"}
ABI3 = "cp311-abi3"


def cells(sm: str = "90") -> list[Cell]:
    names = ("3.13", None, "3.12")
    return [Cell(recipe="causal_conv1d", stack="cu130", interpreter=name, target=Arch.AARCH64, sm=(sm,)) for name in names]


class Foreman(Cluster):
    """A cluster that answers at once. `tags`: of each Python, the wheel's tag, FAILED, or RUNS for a build without end."""

    def __init__(self, settings: Settings, wanted: Sequence[Cell], tags: dict[str, str]) -> None:
        super().__init__(address="head:6379", workers=[Worker(arch=host_arch(), cpus=4, memory=64 << 30)], foreman=None)
        plans = [plan_cell(cell, settings) for cell in wanted]
        vars(self).update(
            plans={plan.build_id: plan for plan in plans},
            tags={plan.build_id: tags[plan.stack.python] for plan in plans},
            asked=[],
            ended=[],
            waited=set(),
        )

    plans: dict[str, Plan]
    tags: dict[str, str]
    asked: list[list[str]]
    "Pythons of each request"
    ended: list[str]
    "Pythons of the builds that were ended"
    waited: set[str]

    def call(self, method: str, *arguments: Any) -> Any:
        if method == "ask":
            ids = [job["build_id"] for job in arguments[1]]
            self.asked.append([self.plans[build_id].stack.python for build_id in ids])
            self.waited.update(ids)
            return []
        if method == "leave":
            self.waited.difference_update(arguments[1])
            self.ended.extend(self.plans[build_id].stack.python for build_id in arguments[1] if self.tags[build_id] == RUNS)
            return None
        if method == "take":
            return [arguments[0]]
        outcomes = {RUNS: None, FAILED: {"failure": FAILURE}}
        return {build_id: {"lines": [], "outcome": outcomes.get(self.tags[build_id], {})} for build_id in self.waited}

    def fetch(self, reference: Any) -> Any:
        plan, tag = self.plans[reference], self.tags[reference]
        content = reference.encode()
        name = f"causal_conv1d-1.0-{tag}-manylinux_2_34_aarch64.whl"
        built = Record(
            build_id=reference,
            recipe=plan.recipe.key,
            name=plan.recipe.data.name,
            version="1.0",
            stack="cu130",
            interpreter=plan.stack.interpreter.name if plan.stack.interpreter is not None else None,
            inputs=plan.inputs,
            outcome="built",
            wheel=BuiltFile(filename=name, sha256=hashlib.sha256(content).hexdigest(), size=len(content)),
            judged_by=judges.digest(plan),
            finished="2026-11-01T00:00:00+00:00",
        )
        return {"record.json": built.model_dump_json().encode(), f"dist/{name}": content}


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setattr(run, "LOOK", 0)
    return load().model_copy(update={"home": tmp_path, "project": REPOSITORY})


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The build ids whose wheels were published."""
    found: set[str] = set()

    def publish(built: Record, *_: object) -> Record:
        found.add(built.build_id)
        return built

    monkeypatch.setattr(run, "publish_build", publish)
    return found


def test_an_abi3_wheel_of_the_first_python_serves_the_others(settings: Settings, published: set[str]) -> None:
    cluster = Foreman(settings, cells(), dict.fromkeys(("3.11", "3.12", "3.13"), ABI3))
    assert build.build_all(cells(), AIM, False, BuildOptions(publish=URL), cluster, settings, Console()) == []
    assert cluster.asked == [["3.11"]]
    assert len(published) == 1
    assert [report.state for report in reports_of(cells(), settings)] == ["served", "built", "served"]


def test_the_next_python_follows_a_failed_one(settings: Settings, published: set[str]) -> None:
    cluster = Foreman(settings, cells(), {"3.11": FAILED, "3.12": ABI3, "3.13": RUNS})
    failures = build.build_all(cells(), AIM, False, BuildOptions(publish=URL), cluster, settings, Console())
    assert [failure.cause for failure in failures] == [FAILURE["cause"]]
    assert cluster.asked == [["3.11"], ["3.12"]]
    assert len(published) == 1


def test_other_pythons_wait_only_for_the_first_wheel_of_a_recipe(settings: Settings, published: set[str]) -> None:
    tags = {"3.11": "cp311-cp311", "3.12": "cp312-cp312", "3.13": "cp313-cp313"}
    both = [*cells("90"), *cells("100")]
    cluster = Foreman(settings, both, tags)
    assert build.build_all(both, AIM, False, BuildOptions(publish=URL), cluster, settings, Console()) == []
    assert [sorted(pythons) for pythons in cluster.asked] == [["3.11", "3.11"], ["3.12", "3.12", "3.13", "3.13"]]
    assert len(published) == 6

    more = Foreman(settings, cells("120"), tags)
    assert build.build_all(cells("120"), AIM, False, BuildOptions(), more, settings, Console()) == []
    assert more.asked == [["3.11", "3.12", "3.13"]], "the last wheel has no stable ABI"


def test_a_recipe_that_becomes_abi3_ends_the_builds_that_its_wheel_serves(settings: Settings, published: set[str]) -> None:
    (first,) = (cell for cell in cells("100") if cell.interpreter is None)
    before = Foreman(settings, [first], {"3.11": "cp311-cp311"})
    assert build.build_all([first], AIM, False, BuildOptions(), before, settings, Console()) == []
    wanted = [*cells(), replace(first, interpreter="3.13")]
    cluster = Foreman(settings, wanted, {"3.11": ABI3, "3.12": RUNS, "3.13": ABI3})
    assert build.build_all(wanted, AIM, False, BuildOptions(publish=URL), cluster, settings, Console()) == []
    assert [sorted(pythons) for pythons in cluster.asked] == [["3.11", "3.12", "3.13", "3.13"]]
    assert cluster.ended == ["3.12"]
    assert len(published) == 2, "one for each sm"
    states = [report.state for report in reports_of(wanted, settings)]
    assert states == ["served", "built", "served", "built"], "the wheel for the other sm serves none of these"


def test_ctrl_c_ends_the_build_that_was_sent(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Foreman(settings, cells(), dict.fromkeys(("3.11", "3.12", "3.13"), RUNS))

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build.build_all(cells(), AIM, False, BuildOptions(), cluster, settings, Console())
    assert (cluster.asked, cluster.ended) == ([["3.11"]], ["3.11"])
