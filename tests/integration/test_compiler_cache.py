"""The compiler cache through the whole flow: real nvcc, real ccache, torch's way of starting them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from builder.box import sandbox
from builder.compiling import units
from builder.compiling.jobs import cores
from builder.flow.root_stage import lay_ground
from builder.planning import recipe, stack
from builder.planning.plan import Caches
from builder.planning.stack import Arch, host_arch
from builder.toolchains import choice, wrappers
from gracefarm.console import Console
from gracefarm.files import remove_tree
from tests import projects
from tests.conftest import Farm
from tests.integration.test_build import NATIVE, start

BUILD = {"cuda": True, "memory_per_job": "1GiB"}
UNITS = ["src/core.cpp", "src/unit_a.cu", "src/unit_b.cu", "src/unit_c.cu"]
SMOKE = """
import many_cuda._core as core
assert core.answer() == int({answer!r}), core.answer()
assert core.launch() == 3 * int({answer!r}), core.launch()
"""


OBJECTS = """
units = sorted(name for name in os.listdir('.') if name.endswith('.c'))
for name in units:
    subprocess.run(['gcc', '-O2', '-c', name, '-o', name[:-2] + '.o'], check=True)
content = b''.join(open(name[:-2] + '.o', 'rb').read() for name in units)
return wheel(wheel_directory, files={'tiny/objects.bin': b'objects' + content})
"""
C_UNITS = {f"{name}.c": f"int {name}(int x) {{ return x * {number}; }}\n" for number, name in enumerate("abcd")}


def tiny(farm: Farm, **more: str) -> None:
    """The same for C, whose units take a moment: a wheel that holds their objects."""
    farm.recipe("tiny", projects.backend(OBJECTS) | C_UNITS | more)


def many(farm: Farm, changes: Mapping[str, str | bytes] | None = None, answer: int | None = None) -> None:
    """The recipe, with files of the project replaced; smoke.py holds the units to what their host_only.h says."""
    files = projects.tree("many_cuda") | dict(changes or {})
    smoke = {"imports": ["many_cuda", "many_cuda._core"]}
    folder = farm.recipe("many_cuda", files, name="many-cuda", stack="cu130", build=BUILD, smoke=smoke)
    header = files["include/host_only.h"]
    said = (header if isinstance(header, str) else header.decode()).split()[-1]
    (folder / "smoke.py").write_text(SMOKE.format(answer=answer or said))


def built(farm: Farm, name: str, *options: str, **variables: str) -> tuple[dict[str, Any], str]:
    """Build; the record, and what was said."""
    target = NATIVE if name == "tiny" else "aarch64"
    done = farm.run("build", name, "--target", target, *options, **variables)
    assert done.code == 0, done.said + farm.run("log", name).out
    found = json.loads(farm.run("show", name, "--json").out)
    assert isinstance(found, dict)
    return found, done.said


def counts(found: dict[str, Any]) -> tuple[int, int, int]:
    cache = found["compiler_cache"]
    return cache["hits"], cache["misses"], cache["uncacheable"]


def forget(farm: Farm) -> None:
    """No build is left, the cache is."""
    remove_tree(farm.settings.home / "builds")


def store(farm: Farm) -> Path:
    return farm.settings.home / "ccache" / "tiny"


def library(farm: Farm, found: dict[str, Any]) -> bytes:
    wheel = farm.settings.home / "builds" / found["build_id"] / "dist" / found["wheel"]["filename"]
    with zipfile.ZipFile(wheel) as opened:
        return opened.read(next(name for name in opened.namelist() if name.endswith((".so", ".bin"))))


def test_a_change_of_one_unit_compiles_that_unit_alone(farm: Farm) -> None:
    many(farm)
    first, said = built(farm, "many_cuda")
    assert counts(first) == (0, 4, 0)
    assert sorted(first["units"]) == UNITS
    assert all(unit["cpu_s"] > 0 and unit["peak_memory"] > 1 << 20 for unit in first["units"].values())
    assert "compiler cache: 0 hits, 4 misses, 0 not cacheable" in said
    assert "# compiler cache: 0 hits, 4 misses" in farm.run("log", "many_cuda").out
    # One unit changes: its own compilation is all that is left.
    one = projects.tree("many_cuda")["src/unit_b.cu"]
    assert isinstance(one, bytes)
    many(farm, {"src/unit_b.cu": one.replace(b"1>>>", b"2>>>")})
    changed, _ = built(farm, "many_cuda")
    assert counts(changed) == (3, 1, 0)
    assert changed["compiler_cache"]["saved_cpu_s"] > 0


def test_objects_from_the_cache_bring_their_header_edges_along(farm: Farm) -> None:
    """Then ninja goes on in the same folder, and knows the headers of each."""
    many(farm)
    first, _ = built(farm, "many_cuda")
    forget(farm)
    second, _ = built(farm, "many_cuda", "--keep")
    assert counts(second) == (4, 0, 0)
    assert library(farm, second) == library(farm, first)
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


def test_what_is_compiled_by_hand_in_the_shell_helps_the_build(farm: Farm) -> None:
    tiny(farm, **{"broken.c": "int broken(\n"})
    assert farm.run("build", "tiny", "--target", NATIVE).code == 21
    text = "int e(void) { return 7; }"
    inside = subprocess.run(
        [sys.executable, "-m", "builder", "shell", "tiny"],
        env=projects.environment(farm.environment),
        input=f"cd source\necho $MAX_JOBS jobs\nprintf '{text}\\n' > e.c\ngcc -O2 -c e.c -o /build/tmp/e.o\n",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert inside.returncode == 0, inside.stderr
    assert f"{cores()} jobs" in inside.stdout
    farm.recipe("tiny", projects.backend(OBJECTS) | {"e.c": f"{text}\n"})
    found, _ = built(farm, "tiny")
    assert counts(found) == (1, 0, 0)


def test_a_header_that_moves_in_front_of_another_is_seen(farm: Farm) -> None:
    """ccache's look-up by the names of the headers that it saw does not see it."""
    body = OBJECTS.replace("'-O2',", "'-O2', '-Ifirst', '-Isecond',")
    files = projects.backend(body) | {"a.c": "#include <answer.h>\nint a(void) { return ANSWER; }\n", "first/readme": ""}
    farm.recipe("tiny", files | {"second/answer.h": "#define ANSWER 1\n"})
    before, _ = built(farm, "tiny")
    farm.recipe("tiny", files | {"second/answer.h": "#define ANSWER 1\n", "first/answer.h": "#define ANSWER 2\n"})
    after, _ = built(farm, "tiny")
    assert counts(after) == (0, 1, 0)
    assert library(farm, before) != library(farm, after)


def test_the_cache_changes_no_bytes_and_no_id_and_can_be_switched_off(farm: Farm) -> None:
    tiny(farm)
    cached, _ = built(farm, "tiny")
    forget(farm)
    without, said = built(farm, "tiny", "--no-compiler-cache")
    assert without["compiler_cache"] is None
    assert "compiler cache" not in said
    assert "# compiler cache: off" in farm.run("log", "tiny").out
    assert sorted(without["units"]) == sorted(C_UNITS)
    assert without["build_id"] == cached["build_id"]
    assert without["inputs"] == cached["inputs"]
    assert library(farm, without) == library(farm, cached)
    forget(farm)
    assert built(farm, "tiny", GRACEFARM_COMPILER_CACHE="off")[0]["compiler_cache"] is None
    forget(farm)
    assert farm.run("build", "tiny", "--target", NATIVE, GRACEFARM_COMPILER_CACHE="some").code == 3


def test_a_build_that_was_killed_goes_on_from_the_cache_in_a_fresh_folder(farm: Farm) -> None:
    tiny(farm, **{"z.c": "".join(f"int z{number}(int x) {{ return x / {number + 1}; }}\n" for number in range(4_000))})
    running = start(farm, "build", "tiny", "--target", NATIVE)
    deadline = time.monotonic() + 120
    notes: list[str] = []
    while len(notes) < 4:
        assert time.monotonic() < deadline
        assert running.poll() is None, running.communicate()
        time.sleep(0.02)
        notes = [
            line
            for path in (farm.settings.home / "builds").glob(f"*/work/{wrappers.UNITS}")
            for line in path.read_text().splitlines()
        ]
    running.kill()
    running.communicate(timeout=30)
    assert running.returncode == -signal.SIGKILL
    found, _ = built(farm, "tiny")
    assert counts(found) == (4, 1, 0)
    assert found["compiler_cache"]["saved_cpu_s"] > 0
    forget(farm)
    assert counts(built(farm, "tiny")[0]) == (5, 0, 0)


def test_what_is_damaged_in_the_cache_is_compiled_again(farm: Farm) -> None:
    tiny(farm)
    first, _ = built(farm, "tiny")
    for harm in (flip, halve):
        harmed = [path for path in store(farm).glob("[0-9a-f]/**/*") if path.is_file() and path.stat().st_size > 200]
        assert len(harmed) >= len(C_UNITS), list(store(farm).rglob("*"))
        for path in harmed:
            path.write_bytes(harm(path.read_bytes()))
        forget(farm)
        again, _ = built(farm, "tiny")
        assert counts(again)[0] == 0
        assert library(farm, again) == library(farm, first)


def flip(content: bytes) -> bytes:
    """One bit of a byte in the middle, which is the object's."""
    half = len(content) // 2
    return content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]


def halve(content: bytes) -> bytes:
    return content[: len(content) // 2]


def test_two_builds_share_a_cache_at_the_same_time(farm: Farm) -> None:
    """Two ids of one recipe, all units equal."""
    tiny(farm)
    running = [start(farm, "build", "tiny", "--target", NATIVE)]
    deadline = time.monotonic() + 120
    while not list((farm.settings.home / "builds").glob("*/work/source/a.c")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    tiny(farm, README="another id")
    running.append(start(farm, "build", "tiny", "--target", NATIVE))
    said = [process.communicate(timeout=240) for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    records = [json.loads(path.read_text()) for path in (farm.settings.home / "builds").glob("*/record.json")]
    assert len(records) == 2
    assert library(farm, records[0]) == library(farm, records[1])
    forget(farm)
    assert counts(built(farm, "tiny")[0]) == (4, 0, 0)


def test_a_cache_that_cannot_be_written_makes_a_build_slower_and_not_red(farm: Farm) -> None:
    tiny(farm)
    store(farm).mkdir(parents=True)
    (store(farm) / "tmp").write_text("in the way of ccache's folder")
    found, _ = built(farm, "tiny")
    assert counts(found)[0] == 0
    assert sorted(found["units"]) == sorted(C_UNITS)


PASSES = """
#include <cuda_runtime.h>
__global__ void kernel(float *x) {
#ifdef __CUDA_ARCH__
#include "device.h"
#if __CUDA_ARCH__ == 800
#include "second.h"
#endif
#endif
}
#ifndef __CUDA_ARCH__
#include "host.h"
#endif
"""
HEADERS = {"device.h": "*x = 1;\n", "second.h": "*x += 2;\n", "host.h": "int host() { return 3; }\n"}


@pytest.mark.parametrize("stack_name", ["cu130", pytest.param("cu124-headers", marks=pytest.mark.slow)])
def test_each_pass_of_each_compiler_counts(farm: Farm, tmp_path: Path, stack_name: str) -> None:
    """Two architectures; a header for each, and one for the host, changes by turns. Then the first state again."""
    farm.recipe("tiny", projects.backend("pass"), stack=stack_name, build={"cuda": True})
    loaded = stack.load(farm.settings.project / "stacks", stack_name)
    made = choice.make_plan(recipe.load(farm.settings.project / "recipes", "tiny"), loaded, host_arch(), Arch.AARCH64)
    ground = lay_ground(made, farm.settings, Console())
    work = tmp_path / "work"
    for name in ("tmp", "source"):
        (work / name).mkdir(parents=True)
    box = made.toolchain.place(made, ground, farm.settings, work, jobs=1, epoch=1, memory=4 << 30, caches=Caches(device=False))
    flags = [
        "-O2",
        "--threads",
        "2",
        "-Xcompiler",
        "-fPIC",
        "--generate-dependencies-with-compile",
        "--dependency-output",
        "unit.o.d",
    ]
    command = ["/cuda/bin/nvcc", *flags, "-c", "/build/source/unit.cu", "-o", "unit.o"]

    def compiled(**changed: str) -> str:
        for name, text in {"unit.cu": PASSES, **HEADERS, **changed}.items():
            (work / "source" / name).write_text(text)
        done = sandbox.run(box, ["/usr/bin/env", "GRACEFARM_SM=90 80", *command], log=tmp_path / "log.txt")
        assert done.returncode == 0, (tmp_path / "log.txt").read_text()
        return units.read(work)[-1].outcome

    assert compiled() == "miss"
    dependencies = (work / "unit.o.d").read_text()
    assert all(name in dependencies for name in HEADERS)
    for name, text in HEADERS.items():
        assert compiled(**{name: text.replace(";", "+1;", 1)}) == "miss", name
    (work / "unit.o").unlink()
    (work / "unit.o.d").unlink()
    assert compiled() == "hit"
    assert (work / "unit.o").is_file()
    assert (work / "unit.o.d").read_text().replace(":", " ").split() == dependencies.replace(":", " ").split()


def test_a_smoke_test_beside_it_which_links_the_headers_makes_no_unit_uncacheable(farm: Farm, tmp_path: Path) -> None:
    """Hard links change a file's ctime: ccache by itself takes that for a change of the file while it compiles."""
    farm.recipe("tiny", projects.backend("pass"), stack="cu130", build={"cuda": True})
    loaded = stack.load(farm.settings.project / "stacks", "cu130")
    made = choice.make_plan(recipe.load(farm.settings.project / "recipes", "tiny"), loaded, host_arch(), Arch.AARCH64)
    ground = lay_ground(made, farm.settings, Console())
    work, headers = tmp_path / "work", tmp_path / "headers"
    for folder in (work / "tmp", work / "source", headers):
        folder.mkdir(parents=True)
    (headers / "answer.h").write_text("#define ANSWER 42\n")
    os.utime(headers / "answer.h", (0, 0))
    (work / "source/a.cu").write_text("#include <answer.h>\nint a(void) { return ANSWER; }\n")
    box = made.toolchain.place(made, ground, farm.settings, work, jobs=1, epoch=1, memory=4 << 30, caches=Caches(device=False))
    assert isinstance(box, sandbox.Sandbox)
    box = replace(box, mounts=(*box.mounts, sandbox.BindMount(source=headers, target="/headers")))
    ended = threading.Event()

    def link() -> None:
        while not ended.is_set():
            (headers / "linked").hardlink_to(headers / "answer.h")
            (headers / "linked").unlink()

    linking = threading.Thread(target=link)
    linking.start()
    try:
        assert (
            sandbox.run(
                box, ["/cuda/bin/nvcc", "-I/headers", "-c", "/build/source/a.cu", "-o", "a.o"], log=tmp_path / "log.txt"
            ).returncode
            == 0
        )
    finally:
        ended.set()
        linking.join()
    assert [note.outcome for note in units.read(work)] == ["miss"]
