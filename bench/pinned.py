"""Measures the pinned CUDA 12.4 builds: CPU time of two units of flash-attn for sm_90, and for sm_80 and sm_90 together.

python -m bench pinned
"""

from __future__ import annotations

import sys
from pathlib import Path

from builder import fetch
from builder.box import sandbox
from builder.fetch import source
from builder.flow.root_stage import lay_ground
from builder.planning import recipe, settings, stack
from builder.planning.plan import NO_CACHES
from builder.planning.stack import Arch
from builder.toolchains import choice
from gracefarm.console import Console
from gracefarm.files import remove_tree

UNITS = ("flash_fwd_hdim64_bf16_causal_sm80", "flash_fwd_split_hdim64_bf16_causal_sm80")
BOUND = 0.6
MEMORY = 16 << 30
TESTS = Path(__file__).parent.parent / "tests"
FLAGS = (
    "-O3",
    "-std=c++17",
    "--use_fast_math",
    "--expt-relaxed-constexpr",
    "--expt-extended-lambda",
    "-U__CUDA_NO_HALF_OPERATORS__",
    "-U__CUDA_NO_HALF_CONVERSIONS__",
    "-U__CUDA_NO_HALF2_OPERATORS__",
    "-U__CUDA_NO_BFLOAT16_CONVERSIONS__",
    "-D_GLIBCXX_USE_CXX11_ABI=0",
    "-Xcompiler=-fPIC",
)
"The options that setup.py and torch pass to nvcc."


def measure(unit: str) -> dict[str, float]:
    """CPU seconds of a unit, by list of sm values. nvcc of CUDA 12.4 is started as in a build."""
    farm = settings.load()
    loaded = recipe.load(TESTS / "recipes", "flash_attn_objects")
    base = stack.load(TESTS / "stacks", "cu124-headers")
    plan = choice.make_plan(loaded, base, stack.host_arch(), Arch.AARCH64)
    ground = lay_ground(plan, farm, Console())
    work = farm.home / "bench"
    remove_tree(work)
    for name in ("tmp", "out"):
        (work / name).mkdir(parents=True)
    fetched = fetch.fetch(loaded.data, farm)
    source.unpack(loaded, fetched, work / "source", source.source_date_epoch(loaded.data, fetched))
    site = f"/env/lib/python{base.data.python}/site-packages/torch/include"
    places = (site, f"{site}/torch/csrc/api/include", f"/usr/include/python{base.data.python}")
    own = ("csrc/flash_attn", "csrc/flash_attn/src", "csrc/cutlass/include")
    includes = [f"-I{place}" for place in (*places, *(f"/build/source/{place}" for place in own))]
    seconds = {}
    for sm in ("90", "80 90"):
        box = plan.toolchain.place(plan, ground, farm, work, jobs=1, epoch=1, memory=MEMORY, caches=NO_CACHES)
        command = [
            "/usr/bin/env",
            f"GRACEFARM_SM={sm}",
            "/cuda/bin/nvcc",
            "-c",
            f"/build/source/csrc/flash_attn/src/{unit}.cu",
            "-o",
            "/build/unit.o",
        ]
        ended = sandbox.run(box, [*command, *FLAGS, *includes], log=work / "log.txt")
        if ended.returncode:
            sys.exit((work / "log.txt").read_text())
        seconds[sm] = ended.cpu_s
    remove_tree(work)
    return seconds


def main() -> None:
    """Print the table. The exit code is 1 if a ratio is above the bound."""
    measured = {}
    for unit in UNITS:
        measured[unit] = measure(unit)
        single, two = measured[unit].values()
        print(f"{unit}: {single:.0f} CPU s for sm_90, {two:.0f} for sm_80 and sm_90: {single / two:.2f}", flush=True)
    single, two = (sum(times) for times in zip(*(by_sm.values() for by_sm in measured.values()), strict=True))
    ratio = single / two
    print(f"both: {single:.0f} and {two:.0f} CPU s: {ratio:.2f} (bound {BOUND})")
    if ratio > BOUND:
        sys.exit(1)
