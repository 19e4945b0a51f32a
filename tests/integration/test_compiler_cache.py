"""The compiler cache through the whole flow: real nvcc, real ccache, torch's way of starting them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from builder.units import NAME
from gracefarm.files import remove_tree
from tests import projects
from tests.conftest import Farm
from tests.integration.test_build import start

BUILD = {"cuda": True, "memory_per_job": "1GiB"}
UNITS = ["src/core.cpp", "src/unit_a.cu", "src/unit_b.cu", "src/unit_c.cu"]
SMOKE = """
import many_cuda._core as core
assert core.answer() == int({answer!r}), core.answer()
assert core.launch() == 3 * int({answer!r}), core.launch()
"""


def many(farm: Farm, changes: Mapping[str, str | bytes] | None = None, answer: int | None = None) -> None:
    """The recipe, with files of the project replaced; smoke.py holds the units to what their host_only.h says."""
    files = projects.tree("many_cuda") | dict(changes or {})
    smoke = {"imports": ["many_cuda", "many_cuda._core"]}
    folder = farm.recipe("many_cuda", files, name="many-cuda", stack="cu130", build=BUILD, smoke=smoke)
    header = files["include/host_only.h"]
    said = (header if isinstance(header, str) else header.decode()).split()[-1]
    (folder / "smoke.py").write_text(SMOKE.format(answer=answer or said))


def built(farm: Farm, *options: str, **variables: str) -> tuple[dict[str, Any], str]:
    """Build; the record, and what was said."""
    done = farm.run("build", "many_cuda", *options, **variables)
    assert done.code == 0, done.said + farm.run("log", "many_cuda").out
    found = json.loads(farm.run("show", "many_cuda", "--json").out)
    assert isinstance(found, dict)
    return found, done.said


def counts(found: dict[str, Any]) -> tuple[int, int, int]:
    cache = found["compiler_cache"]
    return cache["hits"], cache["misses"], cache["uncacheable"]


def forget(farm: Farm) -> None:
    """No build is left, the cache is."""
    remove_tree(farm.settings.home / "builds")


def store(farm: Farm) -> Path:
    return farm.settings.home / "ccache" / "many_cuda"


def library(farm: Farm, found: dict[str, Any]) -> bytes:
    wheel = farm.settings.home / "builds" / found["build_id"] / "dist" / found["wheel"]["filename"]
    with zipfile.ZipFile(wheel) as opened:
        return opened.read(next(name for name in opened.namelist() if name.endswith(".so")))


def test_objects_come_back_whole_and_a_change_is_seen_in_every_pass(farm: Farm) -> None:
    many(farm)
    first, said = built(farm)
    assert counts(first) == (0, 4, 0)
    assert sorted(first["units"]) == UNITS
    assert all(one["cpu_s"] > 0 and one["peak_memory"] > 1 << 20 for one in first["units"].values())
    assert "compiler cache: 0 hits, 4 misses, 0 not cacheable" in said
    assert "# compiler cache: 0 hits, 4 misses" in farm.run("log", "many_cuda").out
    forget(farm)
    second, _ = built(farm)
    assert counts(second) == (4, 0, 0)
    assert library(farm, second) == library(farm, first)
    assert second["build_id"] == first["build_id"]
    # Read by host code alone, which `nvcc -E` does not show: ccache by itself gives the old objects back.
    many(farm, {"include/host_only.h": "#define HOST_ANSWER 43\n"})
    assert counts(built(farm)[0]) == (0, 4, 0)
    # The first content again but for one unit: its own compilation is all that is left.
    one = projects.tree("many_cuda")["src/unit_b.cu"]
    assert isinstance(one, bytes)
    many(farm, {"src/unit_b.cu": one.replace(b"1>>>", b"2>>>")})
    changed, _ = built(farm)
    assert counts(changed) == (3, 1, 0)
    assert changed["compiler_cache"]["saved_cpu_s"] > 0


def test_a_header_that_moves_in_front_of_another_is_seen(farm: Farm) -> None:
    """ccache's look-up by the names of the headers that it saw does not see it."""
    files = projects.tree("many_cuda")
    quoted = {
        name: text.replace(b'"host_only.h"', b"<host_only.h>") for name, text in files.items() if isinstance(text, bytes)
    }
    setup = quoted["setup.py"].replace(b"{cuda}/include -I", b"{cuda}/include -I{os.path.abspath('first')} -I")
    many(farm, quoted | {"setup.py": setup, "first/readme": ""})
    assert counts(built(farm)[0]) == (0, 4, 0)
    many(farm, quoted | {"setup.py": setup, "first/readme": "", "first/host_only.h": "#define HOST_ANSWER 7\n"}, answer=7)
    assert counts(built(farm)[0]) == (0, 4, 0)


def test_the_cache_changes_no_bytes_and_no_id_and_can_be_switched_off(farm: Farm) -> None:
    many(farm)
    cached, _ = built(farm)
    forget(farm)
    without, said = built(farm, "--no-compiler-cache")
    assert without["compiler_cache"] is None
    assert "compiler cache" not in said
    assert sorted(without["units"]) == UNITS
    assert without["build_id"] == cached["build_id"]
    assert without["inputs"] == cached["inputs"]
    assert library(farm, without) == library(farm, cached)
    forget(farm)
    assert built(farm, GRACEFARM_COMPILER_CACHE="off")[0]["compiler_cache"] is None


def test_a_build_that_was_killed_goes_on_from_the_cache_in_a_fresh_folder(farm: Farm) -> None:
    many(farm)
    running = start(farm, "build", "many_cuda", "--jobs", "1")
    deadline = time.monotonic() + 120
    notes: list[str] = []
    while len(notes) < 2:
        assert time.monotonic() < deadline
        assert running.poll() is None, running.communicate()
        time.sleep(0.05)
        notes = [
            line for one in (farm.settings.home / "builds").glob(f"*/work/{NAME}") for line in one.read_text().splitlines()
        ]
    running.kill()
    running.communicate(timeout=30)
    assert running.returncode == -signal.SIGKILL
    forget(farm)
    found, _ = built(farm)
    hits, misses, uncacheable = counts(found)
    assert hits >= len(notes)
    assert (hits + misses, uncacheable) == (4, 0)
    assert misses > 0


def test_what_is_damaged_in_the_cache_is_compiled_again(farm: Farm) -> None:
    many(farm)
    first, _ = built(farm)
    damaged = 0
    for path in store(farm).rglob("*"):
        if path.is_file() and path.stat().st_size > 500:
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 0xFF
            path.write_bytes(content)
            damaged += 1
    assert damaged >= 4
    forget(farm)
    second, _ = built(farm)
    assert counts(second)[0] == 0
    assert library(farm, second) == library(farm, first)
    for path in store(farm).rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)
    forget(farm)
    third, _ = built(farm)
    assert counts(third)[0] == 0
    assert library(farm, third) == library(farm, first)


def test_two_builds_share_a_cache_at_the_same_time(farm: Farm) -> None:
    """Two ids of one recipe, all units equal."""
    many(farm)
    running = [start(farm, "build", "many_cuda", "--jobs", "1")]
    deadline = time.monotonic() + 120
    while not list((farm.settings.home / "builds").glob("*/work/source/setup.py")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    many(farm, {"README": "another id"})
    running.append(start(farm, "build", "many_cuda", "--jobs", "1"))
    said = [one.communicate(timeout=240) for one in running]
    assert [one.returncode for one in running] == [0, 0], said
    records = [json.loads(path.read_text()) for path in (farm.settings.home / "builds").glob("*/record.json")]
    assert len(records) == 2
    assert library(farm, records[0]) == library(farm, records[1])
    forget(farm)
    assert counts(built(farm)[0]) == (4, 0, 0)


def test_a_cache_that_cannot_be_written_makes_a_build_slower_and_not_red(farm: Farm) -> None:
    many(farm)
    store(farm).mkdir(parents=True)
    (store(farm) / "tmp").write_text("in the way of ccache's folder")
    found, _ = built(farm)
    assert counts(found)[0] == 0
    assert sorted(found["units"]) == UNITS


def test_header_edges_are_kept_for_a_tree_that_is_built_on(farm: Farm) -> None:
    """Objects and dependency files from the cache, then ninja again in the same folder: it knows the headers of each."""
    many(farm)
    built(farm)
    forget(farm)
    found, _ = built(farm, "--keep")
    assert counts(found) == (4, 0, 0)
    lines = [
        "cd /build/source/build/temp*",
        "ninja -n -v | tail -1",
        "touch /build/source/include/device_only.h; ninja -n -v; echo STEP",
        "touch /build/source/include/host_only.h; ninja -n -v",
    ]
    inside = subprocess.run(
        [sys.executable, "-m", "builder", "shell", "many_cuda"],
        env=projects.environment(farm.environment),
        input="\n".join([*lines, "exit 0", ""]),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    before, mark, after = inside.stdout.partition("ninja: no work to do.")
    assert mark, inside.stdout + inside.stderr
    device, host = after.split("STEP")
    assert not before.strip()
    assert (device.count(" -c "), host.count(" -c ")) == (3, 4)
