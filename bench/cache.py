"""Measures the compiler cache: the compile stage of a first build, of a second build, and after a change of one line.

    python -m bench cache                                         both projects
    python -c 'from bench import cache; cache.many()'             only the first project

The first project has five CUDA units of equal size and no torch. The second project is causal-conv1d. Its compile stage
imports torch under emulation (about 20 s on the machine of docs/explanation/benchmarks.md). A compiler cache does not save
this time.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from builder.planning import settings
from gracefarm.files import remove_tree
from tests import projects

CAUSAL = "csrc/causal_conv1d_bwd.cu"
SHARED = ("roots", "interpreters", "environments", "toolchains", "cuda", "wrappers", "store", "uv")
SECOND, CHANGED = 0.15, 1.3
"Bounds: time of the second build / time of the first build; time after the change / time of the changed unit."
UNITS = "abcde"
WEIGHT = 9
UNIT = """
template <int N> __device__ float step(float x) {
#pragma unroll
    for (int i = 0; i < 48; i++) x = sinf(x * (N + i)) + expf(x) * cosf(x + i);
    return x;
}
template <int N> __global__ void kernel_NAME(float *values) { values[threadIdx.x] = step<N>(values[threadIdx.x]); }
template <int N> void all(float *values) {
    kernel_NAME<N><<<1, 32>>>(values);
    if constexpr (N > 0) all<N - 1>(values);
}
int launch_NAME() { all<WEIGHT>(nullptr); return 0; }
"""


class Farm:
    """A new home with an empty compiler cache, and with the machine's roots and environments."""

    def __init__(self, folder: Path) -> None:
        home = settings.load().home
        self.home, self.project = folder / "home", folder / "project"
        self.home.mkdir()
        for name in SHARED:
            (self.home / name).symlink_to(home / name)

    def compile(self, recipe: str) -> tuple[float, dict[str, object]]:
        """Build without earlier builds, but with the cache. Return the seconds of the compile stage, and the record."""
        remove_tree(self.home / "builds")
        variables = {"GRACEFARM_HOME": str(self.home), "GRACEFARM_PROJECT": str(self.project)}
        subprocess.run(
            [sys.executable, "-m", "builder", "build", recipe], check=True, env=os.environ | variables, stdout=sys.stderr
        )
        [place] = (self.home / "builds").glob("*/record.json")
        document = json.loads(place.read_text())
        return next(stage["wall_s"] for stage in document["stages"] if stage["name"] == "compile"), document


def measure(farm: Farm, recipe: str, unit: str, change: Path, before: str, after: str) -> None:
    """Build three times, and print the results. Before the third build, replace `before` with `after` in the file `change`."""
    first, record = farm.compile(recipe)
    print(f"{recipe}: {len(record['units'])} units, load {os.getloadavg()[0]:.1f}")  # type: ignore[arg-type]
    print(f"  first build          {first:.1f} s")
    second, record = farm.compile(recipe)
    show("second, from the cache", second, first, SECOND, record)
    text = change.read_text()
    assert before in text
    change.write_text(text.replace(before, after, 1))
    third, record = farm.compile(recipe)
    units = record["units"]
    assert isinstance(units, dict)
    show(f"one line of {unit}", third, units[unit]["wall_s"], CHANGED, record)


def show(what: str, seconds: float, of: float, bound: float, record: Mapping[str, object]) -> None:
    """Print one row."""
    cache = record["compiler_cache"]
    assert isinstance(cache, dict)
    text = f"{cache['hits']} hits, {cache['misses']} misses"
    print(f"  {what:20} {seconds:.1f} s / {of:.1f} s = {seconds / of:.3f} (at most {bound}); {text}", flush=True)


def many() -> None:
    """Measure the project with five CUDA units and without torch."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(dir=settings.load().home)))
        farm = Farm(folder)
        shutil.copytree(settings.load().project / "stacks", farm.project / "stacks")
        files = {name: text for name, text in projects.tree("many_cuda").items() if not name.startswith("src/unit_")}
        units = {f"src/unit_{name}.cu": UNIT.replace("NAME", name).replace("WEIGHT", str(WEIGHT)) for name in UNITS}
        tables = {
            "name": "many-cuda",
            "stack": "cu130",
            "build": {"cuda": True, "memory_per_job": "1GiB"},
            "smoke": {"imports": ["many_cuda"]},
        }
        place = projects.write_recipe(farm.project, "many_cuda", {**files, **units}, tables) / "recipe.toml"
        with place.open("a") as recipe:
            recipe.write('\n[[substitutions]]\npath = "src/unit_c.cu"\nfind = "(N + i)"\nreplace = "(N + i)"\n')
        measure(farm, "many_cuda", "src/unit_c.cu", place, 'replace = "(N + i)"', 'replace = "(N - i)"')


def causal_conv1d() -> None:
    """Measure the recipe causal_conv1d. The changed unit is the one with the longest compile time."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(dir=settings.load().home)))
        farm = Farm(folder)
        for name in ("stacks", "recipes"):
            shutil.copytree(settings.load().project / name, farm.project / name)
        place = farm.project / "recipes" / "causal_conv1d" / "recipe.toml"
        include = "#include <c10/util/BFloat16.h>"
        with place.open("a") as recipe:
            recipe.write(f'\n[[substitutions]]\npath = "{CAUSAL}"\nfind = "{include}"\nreplace = "{include}"\n')
        changed = f'replace = "{include}\\nstatic const int changed = 1;"'
        measure(farm, "causal_conv1d", CAUSAL, place, f'replace = "{include}"', changed)


def main() -> None:
    """Measure both projects, and print the results."""
    many()
    causal_conv1d()
