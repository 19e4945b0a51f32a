"""Units that take memory for real, on a machine too small for two of them: through the whole flow, with the real ninja."""

from __future__ import annotations

import json
import zipfile
from itertools import combinations
from typing import Any

import pytest

from gracefarm.files import remove_tree
from tests import projects
from tests.conftest import Farm
from tests.integration.host_kit import python311
from tests.integration.test_build import NATIVE

# `gcc -wrapper ./hold,MIB` starts cc1 through it: it takes so much memory, keeps it for a while, and then becomes cc1.
HOLD = """
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <sys/wait.h>
static double now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec + t.tv_nsec / 1e9; }
int main(int count, char **words) {
    if (!strstr(words[3], "cc1")) return execvp(words[3], words + 3);
    double started = now();
    size_t size = (size_t)atoi(words[1]) << 20;
    memset(malloc(size), 1, size);
    usleep(atoi(words[2]) * 1000);
    pid_t child = fork();
    if (child == 0) { execvp(words[3], words + 3); _exit(1); }
    int status; waitpid(child, &status, 0);
    char line[4096]; const char *source = "";
    for (int i = 4; i < count; i++) if (strstr(words[i], ".c") && words[i][0] != '-') { source = words[i]; break; }
    FILE *log = fopen("held.txt", "a");
    fprintf(log, "%s %f %f\\n", source, started, now()); fclose(log);
    return WEXITSTATUS(status);
}
"""
BODY = """
import json
os.makedirs('csrc', exist_ok=True)
subprocess.run(['gcc', '-O1', 'hold.c', '-o', 'hold'], check=True)
text = 'rule cc' + chr(10) + '  command = gcc -wrapper ./hold,$mib,$ms -c $in -o $out' + chr(10)
for name, (mib, ms) in sorted(json.load(open('units.json')).items()):
    text += f'build {name}.o: cc {name}' + chr(10) + f'  mib = {mib}' + chr(10) + f'  ms = {ms}' + chr(10)
open('build.ninja', 'w').write(text)
subprocess.run(['ninja', '-v', '-j', os.environ['MAX_JOBS']], check=True)
subprocess.run(['gcc', '-shared', '-fPIC', 'z_long.c', '-o', 'part.so'], check=True)  # cibuildwheel wants no wheel without one
made = {f'tiny/{name}': open(name, 'rb').read() for name in ('held.txt', 'part.so')}
return wheel(wheel_directory, tag=f'py3-none-linux_{os.uname().machine}', files=made)
"""
LARGE, SMALL = 700, 30
UNITS = {"a_large.c": (LARGE, 900), "b_large.c": (LARGE, 900), "c_small.c": (SMALL, 300), "d_small.c": (SMALL, 50)}
UNITS |= {"e_small.c": (SMALL, 300), "z_long.c": (SMALL, 1600)}
MEMORY = {"GRACEFARM_MEMORY": "1380MiB", "GRACEFARM_COMPILER_CACHE": "off"}
"Room for one large unit beside a small one and Python, and not for two."


def held(farm: Farm, *options: str, large_ms: int = 900, **build: object) -> tuple[dict[str, tuple[float, float]], str]:
    """When each unit had its memory, and what was said. `large_ms`: how long a large unit keeps its memory."""
    units = {name: (mib, large_ms if mib == LARGE else ms) for name, (mib, ms) in UNITS.items()}
    files: dict[str, str | bytes] = dict.fromkeys(UNITS, "int x;\n")
    files |= projects.backend(BODY) | {"hold.c": HOLD, "units.json": json.dumps(units), "options": " ".join(options)}
    farm.recipe("tiny", files, build={"cuda": False, "memory_per_job": "100MiB", **build})
    done = farm.run("build", "tiny", "--target", NATIVE, *options, **MEMORY)
    assert done.code == 0, done.said + farm.run("log", "tiny").out
    with zipfile.ZipFile(done.out.strip()) as opened:
        lines = opened.read("tiny/held.txt").decode().splitlines()
    found = {name: (float(start), float(end)) for name, start, end in (line.split() for line in lines)}
    assert sorted(found) == sorted(UNITS)
    return found, done.said


def overlap(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def pairs(found: dict[str, tuple[float, float]], kinds: tuple[str, str]) -> list[bool]:
    """For each pair of units of these kinds, whether they ran beside each other."""
    return [
        overlap(found[first], found[other])
        for first, other in combinations(sorted(found), 2)
        if sorted(("large" if "large" in name else "small") for name in (first, other)) == sorted(kinds)
    ]


def record(farm: Farm) -> dict[str, Any]:
    found = json.loads(farm.run("show", "tiny", "--json").out)
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("toolchain", ["sandbox", "host"])
def test_large_units_that_are_declared_never_run_beside_each_other_and_small_ones_do(farm: Farm, toolchain: str) -> None:
    """What the job count promises is kept whose compilers they may be."""
    own = () if toolchain == "sandbox" else ("--toolchain", "host", "--python", python311())
    found, _ = held(farm, "--jobs", "2", *own, unit_memory={"*_large.c": "750MiB"}, unit_seconds={"z_*.c": 2})
    assert record(farm)["jobs"]["count"] == 2
    begun = sorted(found, key=lambda name: found[name][0])
    assert {name.partition("_")[2] for name in begun[:2]} == {"large.c", "long.c"}, "the long pole that was declared is late"
    assert not any(pairs(found, ("large", "large")))
    assert any(pairs(found, ("large", "small")))
    assert len([stage for stage in record(farm)["stages"] if stage["name"] == "compile"]) == 1


def test_what_one_build_measured_keeps_large_units_apart_in_the_next_and_starts_the_longest_first(farm: Farm) -> None:
    held(farm, "--jobs", "1")
    first = record(farm)
    assert {name for name, unit in first["units"].items() if unit["peak_memory"] > LARGE << 20} == {"a_large.c", "b_large.c"}
    assert first["units"]["z_long.c"]["wall_s"] > 1.6
    found, said = held(farm, "--jobs", "2")
    assert "the memory use of 6 translation units in the last build allows 2" in said
    assert not any(pairs(found, ("large", "large")))
    assert any(pairs(found, ("large", "small")))
    begun = sorted(found, key=lambda name: found[name][0])
    assert {name.partition("_")[2] for name in begun[:2]} == {"large.c", "long.c"}
    remove_tree(farm.settings.home / "builds")


def test_without_either_they_meet_and_the_build_is_killed_once(farm: Farm) -> None:
    """The trap itself: the same project when nothing is declared and nothing known."""
    held(farm, "--jobs", "2", large_ms=4000)  # long enough to be noticed on a busy machine
    kinds = [stage["name"] for stage in record(farm)["stages"]]
    assert kinds.count("compile") == 2
    assert record(farm)["jobs"]["count"] == 1
