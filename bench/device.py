"""Measures the store of device code: CPU seconds of nvcc's device passes for one cell, and for two Pythons and two targets.

    python -m bench device                                                      many_cuda, without torch
    python -c "from bench import device; device.causal_conv1d()"                the recipe causal_conv1d

Each cell is built with an empty compiler cache. All cells use one store of device code, which is empty at the beginning.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.cache import UNIT, WEIGHT, Farm
from builder.planning import settings
from gracefarm.files import remove_tree
from tests import projects

UNITS = "abc"
CELLS = [([*python, "--target", target]) for target in ("aarch64", "x86_64") for python in ([], ["--python", "3.13-trixie"])]
BOUND = 1.1
MANY = 20
"The number of cells of the extrapolation."


def build(farm: Farm, recipe: str, options: list[str]) -> dict[str, Any]:
    """Build a cell. Return its record."""
    remove_tree(farm.home / "builds")
    variables = {"GRACEFARM_HOME": str(farm.home), "GRACEFARM_PROJECT": str(farm.project)}
    command = [sys.executable, "-m", "builder", "build", recipe, "--no-compiler-cache", *options]
    subprocess.run(command, check=True, env=os.environ | variables, stdout=sys.stderr)
    [place] = (farm.home / "builds").glob("*/record.json")
    record: dict[str, Any] = json.loads(place.read_text())
    return record


def measure(farm: Farm, recipe: str) -> None:
    """Build each cell, and print its CPU time."""
    print(
        f"{recipe}: CPU s, load {os.getloadavg()[0]:.1f}; `found`: passes found by text, by NVVM code, by PTX; compiled passes"
    )
    print(f"  {'cell':32} {'device':>7} {'found':>12} {'other compile':>14} {'audit':>6} {'smoke':>6}")
    device: list[float] = []
    rest: list[float] = []
    for options in CELLS:
        record = build(farm, recipe, options)
        took = record["device_code"]
        cpu = {stage["name"]: stage["cpu_s"] or 0.0 for stage in record["stages"]}
        other = cpu["compile"] - took["cpu_s"]
        hits = f"{took['text']} {took['nvvm']} {took['ptx']}; {took['misses']}"
        cell = " ".join(word for word in options if not word.startswith("--"))
        print(f"  {cell:32} {took['cpu_s']:7.1f} {hits:>12} {other:14.1f} {cpu['audit']:6.1f} {cpu['smoke']:6.1f}", flush=True)
        device.append(took["cpu_s"])
        rest.append(other + cpu["audit"] + cpu["smoke"])
    print(f"  device passes, {len(CELLS)} cells / the first: {sum(device):.1f} / {device[0]:.1f}", end=" ")
    print(f"= {sum(device) / device[0]:.3f} (at most {BOUND})")
    once = sum(device) + (MANY - len(CELLS)) * sum(device[1:]) / len(device[1:]) + MANY * sum(rest) / len(rest)
    each = MANY * (device[0] + sum(rest) / len(rest))
    print(f"  {MANY} cells, extrapolated: {once:.0f} CPU s with the store, {each:.0f} without")


def many() -> None:
    """Measure a project with CUDA units of equal size and without torch."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(dir=settings.load().home)))
        farm = Farm(folder)
        shutil.copytree(settings.load().project / "interpreters", farm.project / "interpreters")
        projects.write_stacks(settings.load().project / "stacks", farm.project / "stacks")
        files = {name: text for name, text in projects.tree("many_cuda").items() if not name.startswith("src/unit_")}
        units = {f"src/unit_{name}.cu": UNIT.replace("NAME", name).replace("WEIGHT", str(WEIGHT)) for name in UNITS}
        tables = {
            "name": "many-cuda",
            "stack": "cuda",
            "build": {"cuda": True, "memory_per_job": "1GiB"},
            "smoke": {"imports": ["many_cuda"]},
        }
        projects.write_recipe(farm.project, "many_cuda", {**files, **units}, tables)
        measure(farm, "many_cuda")


def causal_conv1d() -> None:
    """Measure the recipe causal_conv1d. Its three CUDA units are equal for both Pythons after preprocessing."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(dir=settings.load().home)))
        farm = Farm(folder)
        for name in ("stacks", "recipes", "interpreters"):
            shutil.copytree(settings.load().project / name, farm.project / name)
        measure(farm, "causal_conv1d")


def main() -> None:
    """Measure many_cuda, and print the results."""
    many()
