"""Measures the builder: the time of a unit in the sandbox, outside of it, and under emulation; and the overhead of a build."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from builder import fetch
from builder.box import binfmt, sandbox
from builder.box.sandbox import BindMount, Sandbox
from builder.fetch import source
from builder.flow.root_stage import lay_ground
from builder.ground import environment, root
from builder.planning import recipe, settings, stack
from builder.planning.ground import Ground
from builder.planning.plan import NO_CACHES, Plan
from builder.planning.settings import Settings
from builder.planning.stack import Arch
from builder.proof import record
from builder.toolchains import choice
from builder.upkeep import doctor
from gracefarm.console import Console
from gracefarm.files import remove_tree

UNIT = "csrc/causal_conv1d_update.cu"
ROUNDS = 3
MEMORY = 16 << 30


@dataclass(frozen=True, kw_only=True)
class Bed:
    """Everything that the measurements share."""

    plan: Plan
    ground: Ground
    settings: Settings
    work: Path


def make_bed() -> Bed:
    """Unpack causal-conv1d, and assemble its root, its environment and its compilers."""
    farm = settings.load()
    loaded = recipe.load(farm.project / "recipes", "causal_conv1d")
    base = stack.load(farm.project / "stacks", "cu130")
    plan = choice.make_plan(loaded, base, stack.host_arch(), Arch.AARCH64)
    ground = lay_ground(plan, farm, Console())
    work = farm.home / "bench"
    remove_tree(work)
    (work / "tmp").mkdir(parents=True)
    fetched = fetch.fetch(loaded.data, farm)
    source.unpack(loaded, fetched, work / "source", source.source_date_epoch(loaded.data, fetched))
    return Bed(plan=plan, ground=ground, settings=farm, work=work)


def nvcc_line(python: str) -> list[str]:
    """The command that torch's extension builder gives nvcc for the unit."""
    site = f"/env/lib/python{python}/site-packages"
    flags = [
        "-O3",
        "-std=c++17",
        "-Xcompiler",
        "-fPIC",
        "--expt-relaxed-constexpr",
        "--expt-extended-lambda",
        "--use_fast_math",
    ]
    includes = [f"-I{site}/torch/include", f"-I{site}/torch/include/torch/csrc/api/include", f"-I/usr/include/python{python}"]
    defines = ["-DTORCH_EXTENSION_NAME=causal_conv1d_cuda", "-DTORCH_API_INCLUDE_EXTENSION_H"]
    return ["/cuda/bin/nvcc", "-c", f"/build/source/{UNIT}", "-o", "/build/unit.o", *flags, *includes, *defines]


def timed(work: Callable[[], object]) -> float:
    """Wall time of a call in seconds."""
    start = time.monotonic()
    work()
    return time.monotonic() - start


def box(bed: Bed) -> Sandbox:
    """The sandbox of a build."""
    place = bed.plan.toolchain.place(
        bed.plan, bed.ground, bed.settings, bed.work, jobs=1, epoch=1, memory=MEMORY, caches=NO_CACHES
    )
    assert isinstance(place, Sandbox)
    return place


def inside(bed: Bed) -> None:
    """Compile the unit in the sandbox."""
    ended = sandbox.run(box(bed), nvcc_line(bed.plan.stack.data.python), log=bed.work / "log.txt")
    if ended.returncode != 0:
        sys.exit((bed.work / "log.txt").read_text())


def chroot(base: Path, mounts: Sequence[BindMount], variables: dict[str, str], command: Sequence[str], where: Path) -> float:
    """Seconds of the command on the same files with only chroot: no namespace but the mount namespace, no limits, no recorder.

    The time of the mounts is not included, since only a sandbox requires them. The function requires root.
    """
    lines = [f"mount -t tmpfs none {where}"]
    for entry in sorted(base.iterdir()):
        if entry.is_symlink():
            lines.append(f"ln -s {entry.readlink()} {where}/{entry.name}")
        elif entry.is_dir():
            lines.append(f"mkdir -p {where}/{entry.name} && mount --rbind {entry} {where}/{entry.name}")
    lines += [f"mkdir -p {where}/{folder}" for folder in ("proc", "dev", "tmp")]
    lines.append(f"mount -t proc proc {where}/proc && mount --rbind /dev {where}/dev")
    lines += [f"mkdir -p {where}{mount.target} && mount --rbind {mount.source} {where}{mount.target}" for mount in mounts]
    words = " ".join(f"{key}='{value}'" for key, value in variables.items())
    lines.append("start=$(date +%s%N)")
    lines.append(f"chroot {where} /usr/bin/env -i {words} {' '.join(command)}")
    lines.append("echo $(($(date +%s%N) - start))")
    where.mkdir(exist_ok=True)
    script = ["unshare", "--mount", "--propagation", "private", "/bin/sh", "-ec", "\n".join(lines)]
    output = subprocess.run(script, check=True, stdout=subprocess.PIPE, text=True).stdout
    return int(output.splitlines()[-1]) / 1e9


def outside(bed: Bed) -> float:
    """Seconds for the unit outside of a sandbox, with the same command and files."""
    place = box(bed)
    return chroot(
        bed.ground.root, place.mounts, dict(place.environment), nvcc_line(bed.plan.stack.data.python), bed.work / "chroot"
    )


def emulated(bed: Bed) -> Callable[[], float]:
    """Seconds for the unit as cibuildwheel compiles it here: the target's nvcc and g++, which qemu emulates (binfmt)."""
    native = choice.make_plan(bed.plan.recipe, bed.plan.stack, Arch.AARCH64, Arch.AARCH64)
    base = root.ensure(native.stack, Arch.AARCH64, Arch.AARCH64, bed.settings)
    compiler = environment.ensure_toolchain(native.stack, Arch.AARCH64, bed.settings)
    ground = replace(bed.ground, root=base, compiler=compiler)
    place = box(replace(bed, plan=native, ground=ground))
    return lambda: chroot(
        base, place.mounts, dict(place.environment), nvcc_line(native.stack.data.python), bed.work / "chroot"
    )


@contextmanager
def registered(bed: Bed) -> Iterator[None]:
    """Register qemu for aarch64 with the kernel, as users of cibuildwheel do. Restore the earlier state at the end."""
    if binfmt.registration(Arch.AARCH64) is None:
        yield
        return
    doctor.register(Arch.AARCH64, bed.settings)
    try:
        yield
    finally:
        (binfmt.FOLDER / "qemu-aarch64").write_text("-1")


def builder(*arguments: str) -> None:
    """Run `builder` with these arguments."""
    subprocess.run([sys.executable, "-m", "builder", *arguments], check=True, stdout=subprocess.DEVNULL)


def cold_root(bed: Bed) -> float:
    """Seconds to assemble the root in an empty home, including the downloads."""
    home = bed.settings.home / "bench-home"
    remove_tree(home)
    fresh = bed.settings.model_copy(update={"home": home})
    try:
        return timed(lambda: root.ensure(bed.plan.stack, bed.plan.host, bed.plan.target, fresh))
    finally:
        remove_tree(home)


def warm_environment(bed: Bed) -> float:
    """Seconds to assemble the environment in a new home that shares the caches of wheels and byte code."""
    home = bed.settings.home / "bench-home"
    remove_tree(home)
    (home / "environments").mkdir(parents=True)
    for name in ("uv", "environments/bytecode"):
        (home / name).symlink_to(bed.settings.home / name)
    fresh = bed.settings.model_copy(update={"home": home})
    try:
        return timed(lambda: environment.ensure(bed.plan.stack, bed.plan.target, bed.ground.root, fresh))
    finally:
        remove_tree(home)


def main() -> None:
    """Measure and print a table."""
    bed = make_bed()
    rows: list[tuple[str, str]] = []
    if os.geteuid() == 0:
        outside(bed)
        pairs = [(timed(lambda: inside(bed)), outside(bed)) for _ in range(ROUNDS)]
        ours, theirs = (statistics.median(times) for times in zip(*pairs, strict=True))
        rows.append(("translation unit, in the sandbox / outside it", f"{ours:.1f} s / {theirs:.1f} s = {ours / theirs:.3f}"))
        with registered(bed):
            slow = emulated(bed)()
        rows.append(("translation unit, under full emulation / ours", f"{slow:.1f} s / {ours:.1f} s = {slow / ours:.1f}"))
    else:
        rows.append(("translation unit, in the sandbox / outside it", "not run: requires root"))
    if record.existing(bed.plan, bed.settings) is not None:
        again = statistics.median(timed(lambda: builder("build", "causal_conv1d")) for _ in range(ROUNDS))
        rows.append(("build of an existing id", f"{again:.2f} s"))
    else:
        rows.append(("build of an existing id", "not run: causal_conv1d is not built (make run)"))
    rows.append(("root, cold", f"{cold_root(bed):.1f} s"))
    rows.append(("environment, warm", f"{warm_environment(bed):.1f} s"))
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:{width}}  {value}" for name, value in rows))
    (bed.settings.home / "bench-builder.json").write_text(json.dumps(dict(rows), indent=2))
    shutil.rmtree(bed.work, ignore_errors=True)
