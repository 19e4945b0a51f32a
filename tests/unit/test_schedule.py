"""What becomes of a build.ninja: longest first, large units apart; and the same rule when jobs are planned."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from builder.box import meter
from builder.compiling import jobs, units
from builder.compiling.units import CacheStatistics, DeviceStatistics, Unit
from builder.data.toolchain import schedule
from builder.flow import history
from builder.planning.recipe import Build
from tests.unit.test_jobs import GIB, LIKE, built, compiled

TORCH = """\
ninja_required_version = 1.3
nvcc = /cuda/bin/nvcc
rule cuda_compile
  depfile = $out.d
  command = $nvcc -c $in -o $out

build /build/source/build/temp/a.o: cuda_compile /build/source/csrc/a.cu
build /build/source/build/temp/b.o: cuda_compile /build/source/csrc/b.cu
build /build/source/build/temp/c.o: cuda_compile /build/source/csrc/c.cu

default /build/source/build/temp/a.o
"""
CMAKE = """\
include CMakeFiles/rules.ninja
cmake_ninja_workdir = /build/source/cmake/
build cmake_object_order_depends_target__C: phony || csrc
build CMakeFiles/_C.dir/csrc/a$ b.cu.o: CUDA_COMPILER___C_unscanned_Release $
    /build/source/csrc/a$ b.cu || cmake_object_order_depends_target__C
  DEFINES = -DX
  pool = compile
build CMakeFiles/_C.dir/csrc/c.cu.o: CUDA_COMPILER___C_unscanned_Release ../csrc/c.cu | other.h || x
  DEFINES = -DX
build _C.so: LINK CMakeFiles/_C.dir/csrc/a$ b.cu.o
  pool = console
"""


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: set(range(8)))
    monkeypatch.setattr(meter, "cpu_quota", lambda: None)
    monkeypatch.setenv("GRACEFARM_UNITS", "/build/units.jsonl")


def plan(**values: Any) -> dict[str, Any]:
    return {"jobs": 2, "memory": 16, "per_job": 4, "declared": {}, "peaks": {}, "seconds": {}, **values}


def sources(text: str) -> list[str]:
    return [line.rpartition("/")[2] for line in text.splitlines() if line.startswith("build ") and ".cu" in line]


def test_the_longest_unit_starts_first_and_an_unknown_one_is_taken_for_long() -> None:
    seconds = {"csrc/a.cu": 1.0, "csrc/c.cu": 100.0}
    assert sources(schedule.scheduled(TORCH, plan(seconds=seconds), "/build/source")) == ["b.cu", "c.cu", "a.cu"]
    assert sources(schedule.scheduled(TORCH, plan(), "/build/source")) == ["a.cu", "b.cu", "c.cu"]


def test_a_unit_that_is_declared_long_starts_before_all_of_which_nothing_is_known(tmp_path: Path) -> None:
    for name in ("csrc/a.cu", "csrc/b.cu", "csrc/c.cu"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    build = Build(unit_seconds={"c.cu": 1284, "csrc/a.cu": 3})
    first = json.loads(units.schedule({}, build, tmp_path, memory=16, jobs=2))
    assert sources(schedule.scheduled(TORCH, first, "/build/source")) == ["c.cu", "a.cu", "b.cu"]
    measured = {
        name: Unit(wall_s=seconds, cpu_s=1.0, peak_memory=1) for name, seconds in (("csrc/c.cu", 1.0), ("csrc/b.cu", 9.0))
    }
    then = json.loads(units.schedule(measured, build, tmp_path, memory=16, jobs=2))
    assert sources(schedule.scheduled(TORCH, then, "/build/source")) == ["a.cu", "b.cu", "c.cu"]


def test_large_units_share_a_pool_and_start_first() -> None:
    text = schedule.scheduled(TORCH, plan(declared={"b.cu": 9}, peaks={"csrc/c.cu": 10}), "/build/source")
    assert sources(text) == ["b.cu", "c.cu", "a.cu"]
    assert text.startswith(
        "# gracefarm: 2 of 3 units to build need more memory than a job's share; 1 of these units is compiled at a time\n"
        "pool gracefarm_large\n  depth = 1\n"
    )
    assert text.count("  pool = gracefarm_large\n") == 2
    assert "csrc/a.cu\n  pool" not in text
    # A measured peak is believed before a declared one.
    text = schedule.scheduled(TORCH, plan(declared={"csrc/*.cu": 9}, peaks={"csrc/b.cu": 1}), "/build/source")
    assert "csrc/b.cu\n  pool" not in text
    assert text.count("  pool = gracefarm_large\n") == 2


def test_the_message_says_how_many_large_units_are_compiled_at_the_same_time() -> None:
    many = "3 of 9 units to build need more memory than a job's share; 2 of these units are compiled at the same time"
    one = "1 of 9 units to build need more memory than a job's share; 1 of these units is compiled at a time"
    assert [schedule.message(3, 9, 2), schedule.message(1, 9, 1)] == [many, one]
    assert schedule.message(0, 9, 4) == "0 of 9 units to build need more memory than a job's share"


def test_one_job_needs_no_pool() -> None:
    assert "pool = " not in schedule.scheduled(TORCH, plan(jobs=1, declared={"*": 100}), "/build/source")


def test_cmakes_edges_keep_their_lines_and_lose_a_pool_of_their_own_to_ours() -> None:
    text = schedule.scheduled(
        CMAKE, plan(declared={"*.cu": 9}, seconds={"csrc/a b.cu": 1, "csrc/c.cu": 2}), "/build/source/cmake"
    )
    assert sorted(text.splitlines()[3:]) == sorted(
        CMAKE.replace("pool = compile", "pool = gracefarm_large")
        .replace("other.h || x\n", "other.h || x\n  pool = gracefarm_large\n")
        .splitlines()
    )
    assert text.index("csrc/c.cu.o:") < text.index("csrc/a$ b.cu.o:")
    assert "    /build/source/csrc/a$ b.cu || cmake_object_order_depends_target__C\n  pool = gracefarm_large\n" in text


@pytest.mark.parametrize("between", ["flags = -O1\n", "rule other\n  command = x\n", "subninja x.ninja\n"])
def test_what_stands_between_edges_keeps_them_where_they_are(between: str) -> None:
    text = TORCH.replace("build /build/source/build/temp/c.o", between + "build /build/source/build/temp/c.o")
    seconds = {"csrc/a.cu": 1.0, "csrc/b.cu": 2.0, "csrc/c.cu": 3.0}
    found = schedule.scheduled(text, plan(seconds=seconds, declared={"c.cu": 9}), "/build/source")
    assert sources(found) == ["a.cu", "b.cu", "c.cu"]
    assert "csrc/c.cu\n  pool = gracefarm_large\n" in found


TWO_TARGETS = """\
rule cc
  command = cp $in $out
build large.o: cc src/large.c
build a.o: cc src/a$ b.c
build libextra.a: phony large.o
build wheel: phony a.o
build all: phony libextra.a wheel
"""


def run_front(folder: Path, *arguments: str, large: str = "large.c") -> subprocess.CompletedProcess[str]:
    """schedule.py in front of the real ninja, in the folder source/b of a build."""
    names = json.dumps(plan(declared={large: 9}))
    (folder / "schedule.json").write_text(names)
    variables = {"GRACEFARM_UNITS": str(folder / "units.jsonl"), "GRACEFARM_SCHEDULE": str(folder / "schedule.json")}
    ninja = shutil.which("ninja")
    assert ninja is not None
    command = [sys.executable, "-I", "-S", schedule.__file__, ninja, *arguments]
    return subprocess.run(
        command, cwd=folder / "source/b", env={**os.environ, **variables}, capture_output=True, text=True, check=False
    )


@pytest.fixture
def build_folder(tmp_path: Path) -> Path:
    (tmp_path / "source/b/src").mkdir(parents=True)
    for name in ("large.c", "a b.c"):
        (tmp_path / "source/b/src" / name).write_text("int x;\n")
    (tmp_path / "source/b/build.ninja").write_text(TWO_TARGETS)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "counted"),
    [
        (("-j", "2", "wheel"), "0 of 1"),
        (("-v", "libextra.a"), "1 of 1"),
        ((), "1 of 2"),
        (("-C", "../b", "all"), "1 of 2"),
        (("no such target",), "1 of 2"),
    ],
)
def test_units_that_this_call_does_not_build_are_not_counted(
    build_folder: Path, arguments: tuple[str, ...], counted: str
) -> None:
    done = run_front(build_folder, *arguments)
    assert f"gracefarm: {counted} units to build need more memory" in done.stderr
    assert (done.returncode == 0) is ("no such target" not in arguments), done.stdout + done.stderr


def test_a_manifest_that_its_own_edge_writes_again_is_not_built_from_a_stale_copy(build_folder: Path) -> None:
    """As CMake's, when a CMakeLists.txt has changed after the configure step."""
    folder = build_folder / "source/b"
    again = "rule again\n  command = cp next.ninja build.ninja\n  generator = 1\nbuild build.ninja: again next.ninja\n"
    (folder / "build.ninja").write_text(TWO_TARGETS + again)
    (folder / "next.ninja").write_text(TWO_TARGETS + "build new.o: cc src/large.c\n" + again)
    os.utime(folder / "build.ninja", (1, 1))
    done = run_front(build_folder, "new.o")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 1 units" in done.stderr
    assert (folder / "new.o").is_file()
    (folder / "next.ninja").write_text(again.replace("cp next.ninja build.ninja", "echo the reason; false"))
    (folder / "build.ninja").write_text(TWO_TARGETS + (folder / "next.ninja").read_text())
    os.utime(folder / "build.ninja", (1, 1))
    failed = run_front(build_folder, "wheel")
    assert failed.returncode != 0
    assert "the reason" in failed.stdout


def test_whatever_runs_at_once_fits() -> None:
    """Any choice of jobs that the pool allows, for thousands of random sets of units."""
    chance = random.Random(4)
    for _ in range(3000):
        count, memory = chance.randint(2, 8), chance.randint(8, 64)
        peaks = [chance.randint(1, min(memory, 24)) for _ in range(chance.randint(1, 12))]
        depth = schedule.large_at_once(memory, peaks, count)
        large = sorted((peak for peak in peaks if peak * count > memory), reverse=True)
        rest = sorted((peak for peak in peaks if peak * count <= memory), reverse=True)
        if depth is None:
            assert large[0] + (count - 1) * (rest or [0])[0] > memory
            continue
        for beside in range(min(depth, len(large)) + 1):
            assert sum(large[:beside]) + sum(rest[: count - beside]) <= memory


def test_known_units_allow_more_jobs_than_a_declaration_for_the_largest_of_them() -> None:
    peaks = [int(8.7 * GIB), int(7.7 * GIB), *[int(2.5 * GIB)] * 60]
    assert jobs.plan(memory=24 * GIB, memory_per_job="9GiB", wanted=None).count == 2
    found = jobs.plan(memory=24 * GIB, memory_per_job="9GiB", wanted=None, peaks=peaks)
    assert found.count == 6
    assert "the memory use of 62 translation units in the last build allows 6" in found.reason


def test_declared_large_units_lower_the_jobs_beside_which_one_of_them_fits() -> None:
    found = jobs.plan(memory=24 * GIB, memory_per_job="4GiB", wanted=None, declared=[9 * GIB, 8 * GIB])
    assert found.count == 4
    assert "without two large units at once" in found.reason
    assert jobs.plan(memory=24 * GIB, memory_per_job="4GiB", wanted=None).count == 6
    assert jobs.plan(memory=8 * GIB, memory_per_job="4GiB", wanted=None, declared=[9 * GIB]).count == 1


def test_a_build_from_the_cache_teaches_nothing_about_memory() -> None:
    warm = CacheStatistics(hits=1, misses=0, uncacheable=0, saved_cpu_s=1)
    one = built(compiled(1, 16), count=8).model_copy(update={"compiler_cache": warm})
    assert history.learned_jobs([one], LIKE) is None
    stored = DeviceStatistics(text=0, nvvm=0, ptx=1, misses=1, cpu_s=1, saved_cpu_s=1)
    one = built(compiled(1, 16), count=8).model_copy(update={"device_code": stored})
    assert history.learned_jobs([one], LIKE) is None
    cold = stored.model_copy(update={"ptx": 0})
    assert history.learned_jobs([one.model_copy(update={"device_code": cold})], LIKE) is not None


def test_the_newest_word_on_a_unit_counts_and_a_hit_changes_nothing() -> None:
    old = built(compiled(1, 16), count=1).model_copy(
        update={"units": {name: Unit(wall_s=9, cpu_s=9, peak_memory=9) for name in ("a.cu", "b.cu")}}
    )
    new = old.model_copy(update={"units": {"a.cu": Unit(wall_s=1, cpu_s=1, peak_memory=1)}})
    known = history.learned_units([new, old], LIKE)
    assert {name: unit.cpu_s for name, unit in known.items()} == {"a.cu": 1, "b.cu": 9}
    notes = [
        units.Note(unit="a.cu", outcome="hit", wall_s=0.1, cpu_s=0.1, peak_memory=1),
        units.Note(unit="b.cu", outcome="unsupported compiler option", wall_s=3, cpu_s=3, peak_memory=3),
    ]
    assert {name: unit.cpu_s for name, unit in units.costs(notes, known).items()} == {"a.cu": 1, "b.cu": 3}
    found = units.statistics(notes, known)
    assert found is not None
    assert units.title(found) == (
        "compiler cache: 1 hits, 0 misses, 1 not cacheable; 1 x unsupported compiler option; about 1 CPU s saved"
    )
