"""Job counts: what an earlier build needed corrects what the recipe declares."""

from __future__ import annotations

import pytest

from builder.box import meter
from builder.compiling import jobs
from builder.compiling.jobs import Jobs, Learned
from builder.compiling.units import Unit
from builder.flow import history
from builder.proof.record import Record, Stage

GIB = 2**30
LIKE = ("cu130", "aarch64", ("90",), None)


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: set(range(8)))
    monkeypatch.setattr(meter, "cpu_quota", lambda: None)


def count(memory: int, past: Learned | None, wanted: int | None = None) -> int:
    return jobs.plan(memory=memory * GIB, memory_per_job="4GiB", wanted=wanted, past=past).count


def built(*stages: Stage, count: int, target: str = "aarch64", sm: tuple[str, ...] = ("90",)) -> Record:
    return Record(
        build_id="1" * 64,
        recipe="thing",
        name="thing",
        version="1",
        stack="cu130",
        inputs={"target": target, "stack": {"sm": list(sm), "ptx": None}},
        outcome="built",
        jobs=Jobs(count=count, reason=""),
        stages=stages,
        finished="2026-11-24T00:00:00+00:00",
    )


def compiled(peak: int, bound: int) -> Stage:
    return Stage(name="compile", wall_s=1, peak_memory=peak * GIB, memory_bound=bound * GIB)


def test_without_an_earlier_build_the_recipe_is_believed() -> None:
    assert count(16, None) == 4


def test_a_job_count_that_was_seen_to_fit_is_allowed() -> None:
    assert count(16, Learned(count=8, peak=10 * GIB, killed_at=None)) == 8


def test_a_peak_that_does_not_fit_lowers_the_count_by_the_mean_of_a_job() -> None:
    assert count(16, Learned(count=2, peak=18 * GIB, killed_at=None)) == 1


def test_more_jobs_than_were_killed_are_not_tried_again_in_no_more_memory() -> None:
    past = history.learned_jobs([built(compiled(16, 16), compiled(12, 16), count=2)], LIKE)
    assert past == Learned(count=2, peak=12 * GIB, killed_at=16 * GIB)
    assert count(16, past) == 2
    assert count(32, past) == 8


def test_the_user_bounds_what_was_learned() -> None:
    assert count(16, Learned(count=8, peak=10 * GIB, killed_at=None), wanted=3) == 3


def test_other_architectures_teach_nothing() -> None:
    """nvcc takes longer and more memory for two architectures than for one."""
    one = built(compiled(1, 16), count=8).model_copy(update={"units": {"a.cu": Unit(wall_s=9, cpu_s=9, peak_memory=9)}})
    two = one.model_copy(update={"inputs": one.inputs | {"stack": {"sm": ["100", "90"], "ptx": None}}})
    assert history.learned_jobs([one], LIKE) is not None
    assert history.learned_jobs([two], LIKE) is None
    assert history.learned_units([two, one], LIKE) == one.units
    assert history.learned_units([two], LIKE) == {}


def test_another_target_teaches_nothing() -> None:
    assert history.learned_jobs([built(compiled(1, 16), count=8, target="x86_64")], LIKE) is None


def test_a_containers_cpu_quota_bounds_the_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter, "cpu_quota", lambda: 2.5)
    assert count(64, None) == 3
    monkeypatch.setattr(meter, "cpu_quota", lambda: 0.2)
    assert count(64, None) == 1
    monkeypatch.setattr(meter, "cpu_quota", lambda: 64.0)
    assert count(64, None) == 8
