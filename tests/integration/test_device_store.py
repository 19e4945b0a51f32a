"""The store of device code with the real nvcc: what is found, what is not, and that no byte depends on it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from builder.box import sandbox
from builder.box.sandbox import Sandbox
from builder.data.toolchain import bitcode
from builder.flow import rebuild
from builder.flow.root_stage import lay_ground
from builder.planning import recipe, stack
from builder.planning.plan import Caches
from builder.planning.stack import Arch, host_arch
from builder.toolchains import choice, device_store
from gracefarm.console import Console
from gracefarm.files import remove_tree
from tests import projects
from tests.conftest import Farm, new_farm
from tests.integration.test_build import record_of, start

HOST_ONLY = pytest.mark.skipif(host_arch() is Arch.AARCH64, reason="only an x86_64 host builds for x86_64")
UNIT = """
#include <cassert>
#include <cstdio>
#include <vector>
#include "kernel.h"
namespace {
__device__ int counter = 3;
__constant__ float table[4] = {1, 2, 3, 4};
__global__ void anonymous(float *x, bool flag) {
    assert(x != nullptr);
    if (flag) x[threadIdx.x] = sinf(x[0]) * FACTOR + table[2] + counter;
}
}
static __global__ void local(double *x) { x[0] = pow(x[1], 1.7) + erf(x[2]); printf("%f", x[0]); }
template <typename T, bool B> __global__ void generic(T *x) { x[0] = B ? x[1] : x[2] / x[3]; }
__managed__ int managed = 4;
int run() {
    std::vector<int> host(HOST);
    anonymous<<<1, 1>>>(nullptr, true);
    local<<<1, 1>>>(nullptr);
    generic<float, true><<<1, 1>>>(nullptr);
    generic<int, false><<<1, 1>>>(nullptr);
    return host.size();
}
"""
HEADER = "#define FACTOR 2\n#ifndef __CUDA_ARCH__\n#define HOST 5\n#else\n#define HOST 6\n#endif\n"
SMALL = """
#include "kernel.h"
__device__ float counter = 3;
__global__ void kernel(float *x) { x[threadIdx.x] = x[0] / FACTOR * counter + x[1]; }
int run() { kernel<<<1, 1>>>(nullptr); return HOST; }
"""
TEMPLATES = """
#include "kernel.h"
namespace { __device__ int counter = 3; __device__ float table[4]; }
template <typename T> __global__ void kernel(T *x) { x[threadIdx.x] = x[0] / FACTOR + counter + table[threadIdx.x % 4]; }
template <typename T> void run(T *x) {
    kernel<<<1, 1>>>(x);
    cudaMemcpyToSymbol(table, x, 4);
    cudaMemcpyToSymbol(counter, x, 4);
}
template void run<float>(float *);
"""
"Without an external symbol: cudafe++ puts its process id into the names of device code."
CHARS = "__global__ void chars(int *x, char c) { x[0] = c / 2; }\nint run() { chars<<<1, 1>>>(nullptr, 'c'); return 0; }\n"


@dataclass
class Bed:
    """Sandboxes with nvcc, for one target or both, over one store."""

    farm: Farm
    work: Path
    boxes: dict[Arch, Sandbox]

    def write(self, **files: str) -> None:
        """Files of the source, by their names with _ for the dot."""
        for name, text in files.items():
            (self.work / "source" / name.replace("_", ".")).write_text(text)

    def command(self, script: str, target: Arch = Arch.AARCH64, **variables: str) -> str:
        """Run a line of shell inside; what it printed."""
        box = replace(self.boxes[target], environment={**self.boxes[target].environment, **variables})
        log = self.work / "log.txt"
        log.unlink(missing_ok=True)
        done = sandbox.run(box, ["/bin/bash", "-c", script], log=log)
        assert done.returncode == 0, log.read_text()
        return log.read_text()

    def compile(
        self,
        flags: str = "",
        target: Arch = Arch.AARCH64,
        nvcc: str = "/cuda/passes/nvcc",
        before: str = "",
        **variables: str,
    ) -> bytes:
        """The object of unit.cu. `before`: a command that runs first."""
        (self.work / "notes").unlink(missing_ok=True)
        compiler = f"-ccbin {target.triplet}-g++" if target is not host_arch() else ""
        flags = f"-O2 -Xcompiler -fPIC -I/cuda/include -I/cuda/include/cccl {compiler} {flags or '-arch=sm_90'}"
        script = f"cd /build/source && {before} {nvcc} {flags} -c unit.cu -o unit.o"
        self.said = self.command(script, target, **{"GRACEFARM_DEVICE_NOTES": "/build/notes", **variables})
        return (self.work / "source" / "unit.o").read_bytes()

    def outcomes(self) -> list[str]:
        """What became of cicc and ptxas of the last object."""
        notes = [json.loads(line) for line in (self.work / "notes").read_text().splitlines()]
        return [note["outcome"] for note in notes if note["pass"] != "fatbinary"]

    @property
    def entries(self) -> list[Path]:
        """The files of the store."""
        return sorted(device_store.folder(self.farm.settings, "tiny").glob("*/*"))


def made(farm: Farm, tmp_path: Path, *targets: Arch, stack_name: str = "cuda") -> Bed:
    farm.recipe("tiny", projects.backend("pass"), stack=stack_name, build={"cuda": True})
    loaded = stack.load(farm.settings.project / "stacks", stack_name)
    boxes = {}
    for name in ("tmp", "source"):
        (tmp_path / name).mkdir()
    for target in targets:
        plan = choice.make_plan(recipe.load(farm.settings.project / "recipes", "tiny"), loaded, host_arch(), target)
        ground = lay_ground(plan, farm.settings, Console())
        caches = Caches(compiler=False)
        box = plan.toolchain.place(plan, ground, farm.settings, tmp_path, jobs=1, epoch=1, memory=4 << 30, caches=caches)
        assert isinstance(box, Sandbox)
        boxes[target] = box
    bed = Bed(farm=farm, work=tmp_path, boxes=boxes)
    bed.write(unit_cu=UNIT, kernel_h=HEADER)
    return bed


@pytest.fixture
def bed(farm: Farm, tmp_path: Path) -> Bed:
    return made(farm, tmp_path, Arch.AARCH64)


def test_equal_device_code_is_found_and_any_change_of_it_is_not(bed: Bed) -> None:
    bed.write(unit_cu=SMALL)
    first = bed.compile()
    assert bed.outcomes() == ["miss", "miss"]
    changes: Mapping[str, Callable[[], bytes]] = {
        "an option": lambda: bed.compile("-arch=sm_90 --use_fast_math"),
        "an option that only cicc gets": lambda: bed.compile("-arch=sm_90 --fmad=false"),
        "the architecture": lambda: bed.compile("-arch=sm_80"),
        "the compilers": lambda: bed.compile(GRACEFARM_DEVICE_COMPILERS="others"),
        "a constant of a kernel": lambda: changed(bed, SMALL.replace("= 3", "= 4"), HEADER),
        "a header": lambda: changed(bed, SMALL, HEADER.replace("FACTOR 2", "FACTOR 3")),
    }
    for what, change in changes.items():
        change()
        assert bed.outcomes() == ["miss", "miss"], what
    assert changed(bed, SMALL, HEADER) == first
    assert bed.outcomes() == ["text", "ptx"]


def changed(bed: Bed, unit: str, header: str) -> bytes:
    bed.write(unit_cu=unit, kernel_h=header)
    return bed.compile()


def test_text_that_device_code_does_not_use_runs_only_the_front_end(bed: Bed) -> None:
    """As Python.h of another version, which is read after the kernels: their lines stay."""
    bed.compile()
    bed.write(unit_cu=UNIT + "struct Unused { int number; };\nstatic inline int unused(Unused *u) { return u->number; }\n")
    found = bed.compile()
    assert bed.outcomes() == ["nvvm", "ptx"]
    assert found == bed.compile(GRACEFARM_DEVICE_STORE="")
    assert bed.outcomes() == ["miss", "miss"]


FLAGS = {
    "two architectures and PTX": "-gencode=arch=compute_90a,code=sm_90a -gencode=arch=compute_80,code=[sm_80,compute_80]",
    "lines": "-arch=sm_90 -lineinfo -g --ptxas-options=-v --expt-relaxed-constexpr --expt-extended-lambda",
    "fast": "-arch=sm_90 --use_fast_math -std=c++20 --threads 2",
    "linked": "-arch=sm_90 -rdc=true -lineinfo",
    "Blackwell": "-gencode=arch=compute_100f,code=sm_100f",
    "unknown to us": "-arch=sm_90 --restrict -maxrregcount=64",
    "debug": "-arch=sm_90 -G",
}


SLOW = ("fast", "Blackwell", "unknown to us", "debug")


@pytest.mark.parametrize(
    "flags", [pytest.param(flags, id=name, marks=[pytest.mark.slow] * (name in SLOW)) for name, flags in FLAGS.items()]
)
def test_an_object_is_that_of_the_plain_nvcc_to_the_last_byte(bed: Bed, flags: str) -> None:
    plain = bed.compile(flags, nvcc="/toolchain/nvidia/cu13/bin/nvcc")
    said = bed.said
    assert bed.compile(flags, GRACEFARM_DEVICE_STORE="") == plain
    assert bed.compile(flags) == plain
    if "-G" in flags:
        assert set(bed.outcomes()) == {"option -g"}
    else:
        assert set(bed.outcomes()) == {"miss"}
        assert bed.compile(flags) == plain
        assert set(bed.outcomes()) == {"text", "ptx"}
    assert without_times(bed.said) == without_times(said)


def without_times(text: str) -> list[str]:
    return [line for line in text.splitlines() if "Compile time" not in line]


@pytest.mark.slow
def test_of_another_release_cicc_runs_in_one_step(farm: Farm, tmp_path: Path) -> None:
    bed = made(farm, tmp_path, Arch.AARCH64, stack_name="cu124-headers")
    plain = bed.compile(nvcc="/toolchain/nvidia/cu12/bin/nvcc")
    for outcomes in (["miss", "miss"], ["text", "ptx"]):
        assert bed.compile() == plain
        assert bed.outcomes() == outcomes


@HOST_ONLY
def test_both_hosts_share_device_code_unless_the_sign_of_char_counts(farm: Farm, tmp_path: Path) -> None:
    bed = made(farm, tmp_path, Arch.AARCH64, Arch.X86_64)
    for flags in ("-arch=sm_90", "-arch=sm_90 -lineinfo"):
        bed.compile(flags)
        assert bed.outcomes() == ["miss", "miss"]
        found = bed.compile(flags, Arch.X86_64)
        assert b"anonymous" in found
        assert bed.outcomes() == ["nvvm", "ptx"]
        assert bed.compile(flags, Arch.X86_64, GRACEFARM_DEVICE_STORE="") == found
    bed.write(unit_cu=CHARS)
    for target in bed.boxes:
        bed.compile(target=target)
        assert bed.outcomes() == ["miss", "miss"]
    signed = bed.compile(target=Arch.X86_64, nvcc="/toolchain/nvidia/cu13/bin/nvcc")
    assert signed == bed.compile(target=Arch.X86_64)
    # Units that call each other's functions have to agree, so they keep their own extension.
    bed.write(unit_cu=UNIT)
    bed.compile("-arch=sm_90 -rdc=true")
    bed.compile("-arch=sm_90 -rdc=true", Arch.X86_64)
    assert bed.outcomes() == ["miss", "miss"]


@HOST_ONLY
def test_a_unit_without_external_symbols_has_the_same_names_in_each_build_and_cell(farm: Farm, tmp_path: Path) -> None:
    bed = made(farm, tmp_path, Arch.AARCH64, Arch.X86_64)
    bed.write(unit_cu=TEMPLATES)
    later = "/bin/true; /bin/true;"  # other process ids
    plain = [bed.compile(nvcc="/toolchain/nvidia/cu13/bin/nvcc", before=before) for before in ("", later)]
    assert plain[0] != plain[1], "cudafe++ does not use its process id any more: remove `cudafe` from device.py"
    first = bed.compile()
    assert bed.outcomes() == ["miss", "miss"]
    assert bed.compile(before=later) == first
    assert bed.outcomes() == ["text", "ptx"]
    other = bed.compile(target=Arch.X86_64, before=later)
    assert bed.outcomes() == ["nvvm", "ptx"]
    assert len(ids_of(first)) == 1, "the host's code and the device code have the same names"
    assert ids_of(other) == ids_of(first)
    # Two objects of one source are different units, and so are two texts.
    assert ids_of(bed.compile("-arch=sm_90 -DSECOND", nvcc="/gracefarm/bin/nvcc")) != ids_of(first)
    bed.write(unit_cu=TEMPLATES.replace("= 3", "= 4"))
    assert ids_of(bed.compile()) != ids_of(first)


def ids_of(content: bytes) -> set[bytes]:
    """The module ids in the names of an object, without the process id, which the length of a name follows."""
    return set(re.findall(rb"[0-9a-f]{8}_7_unit_cu_[0-9a-f]{8}", content))


def test_modules_that_differ_in_nothing_but_the_extension_of_bool_are_told_from_others(bed: Bed) -> None:
    front_end = (
        "/toolchain/nvidia/cu13/nvvm/bin/cicc -lgenfe unit.cpp1.ii -o {name}.bc --emit-llvm-bc --c++17 --gnu_version=120200"
        " --orig_src_file_name unit.cu --orig_src_path_name /unit.cu --m64 -tused --gen_c_file_name c --stub_file_name stub"
        " --gen_device_file_name gpu --include_file_name fatbin.c --nv_arch compute_90 --no-device-float128"
        " -nvvm-version=nvvm70 {signs}"
    )
    nvcc = "/toolchain/nvidia/cu13/bin/nvcc -I/cuda/include -arch=sm_90 --keep -ptx unit.cu"
    nvcc += f" -ccbin {Arch.AARCH64.triplet}-g++" if host_arch() is not Arch.AARCH64 else ""

    def module(name: str, unit: str, signs: str = "") -> bytes:
        bed.write(unit_cu=unit)
        bed.command(f"cd /build/source && {nvcc} && {front_end.format(name=name, signs=signs)}")
        return (bed.work / "source" / f"{name}.bc").read_bytes()

    parameters = "int *x, bool a"
    lengths = set()
    for number in range(4):  # each argument lengthens the block of attributes, by words or not
        parameters += f", bool b{number}"
        unit = f"__global__ void kernel({parameters}) {{ if (a) x[0] = 1; }}\n"
        signed, unsigned = module("signed", unit), module("unsigned", unit, "--unsigned_chars")
        lengths.add(len(unsigned) - len(signed))
        assert signed != unsigned
        assert bitcode.differ_only_in_extension(signed, unsigned)
        assert bitcode.differ_only_in_extension(unsigned, signed)
        assert not bitcode.differ_only_in_extension(signed, unsigned.replace(b"kernel", b"karnel"))
        assert not bitcode.differ_only_in_extension(signed, unsigned[:-64])
        assert not bitcode.differ_only_in_extension(signed, b"")
    assert len(lengths) > 1
    other = module("other", unit.replace("= 1", "= 2"), "--unsigned_chars")
    assert not bitcode.differ_only_in_extension(signed, other)
    char = [module(str(number), CHARS, signs) for number, signs in enumerate(("", "--unsigned_chars"))]
    assert not bitcode.differ_only_in_extension(*char)


def test_what_is_damaged_in_the_store_is_compiled_again(bed: Bed) -> None:
    bed.write(unit_cu=SMALL)
    first = bed.compile()
    for harm in (lambda content: content[:-9], lambda content: content[:90] + b"\0" + content[91:], lambda _: b""):
        assert len(bed.entries) == 4
        for entry in bed.entries:
            entry.write_bytes(harm(entry.read_bytes()))
        assert bed.compile() == first
        assert bed.outcomes() == ["miss", "miss"]
        assert bed.compile() == first
        assert bed.outcomes() == ["text", "ptx"]
    for entry in bed.entries:  # as the store removes them for room
        entry.unlink()
        assert bed.compile() == first
    assert len(bed.entries) == 3  # a cell for aarch64 does not read the NVVM code, so a found text does not write it again


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_a_store_on_a_full_disk_makes_a_build_slower_and_not_red(bed: Bed) -> None:
    bed.write(unit_cu=SMALL)
    first = bed.compile()
    folder = device_store.folder(bed.farm.settings, "tiny")
    remove_tree(folder)
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "full", str(folder)], check=True)
    try:
        assert bed.compile() == first
        assert bed.outcomes() == ["miss", "miss"]
        assert all(not entry.name.endswith(".partial") for entry in bed.entries)
        assert bed.compile() == first
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_the_store_keeps_to_its_size_and_drops_what_was_not_used(bed: Bed) -> None:
    bed.compile()
    old = bed.entries
    for entry in old:
        os.utime(entry, (1, 1))
    partial = old[0].with_name(".killed.partial")
    partial.write_bytes(b"half")
    os.utime(partial, (1, 1))
    bed.write(unit_cu=CHARS)
    bed.compile()
    size = sum(entry.stat().st_size for entry in bed.entries if entry not in old)
    settings = bed.farm.settings.model_copy(update={"device_store": f"{size >> 10 or 1}KiB"})
    device_store.trim(bed.farm.settings, "tiny")
    assert not partial.exists()
    assert len(bed.entries) == 8
    device_store.trim(settings, "tiny")
    assert not set(old) & set(bed.entries)
    assert sum(entry.stat().st_size for entry in bed.entries) <= device_store.limit(settings)


def tiny_cuda(farm: Farm) -> None:
    """The recipe of the smallest project with a kernel."""
    tables: dict[str, Any] = {"build": {"cuda": True, "memory_per_job": "1GiB"}, "stack": "cuda"}
    smoke = {"imports": ["tiny_cuda", "tiny_cuda._core"]}
    # As many_cuda loads libcudart: without torch, which this stack lacks.
    files = projects.tree("tiny_cuda") | {"tiny_cuda/__init__.py": projects.tree("many_cuda")["many_cuda/__init__.py"]}
    farm.recipe("tiny_cuda", files, name="tiny-cuda", smoke=smoke, **tables)


@pytest.fixture(scope="module")
def cells(shared_home: Path) -> Iterator[Farm]:
    """A farm with tiny_cuda built for the root's Python."""
    with new_farm(shared_home) as farm:
        tiny_cuda(farm)
        yield farm


def built(farm: Farm, *options: str) -> tuple[dict[str, Any], Path]:
    """Build a cell; its record and its wheel."""
    done = farm.run("build", "tiny_cuda", "--no-compiler-cache", *options)
    assert done.code == 0, done.said + farm.run("log", "tiny_cuda").out
    found: Any = record_of(farm, "tiny_cuda")
    device = found["device_code"]
    assert f"{device['text'] + device['nvvm'] + device['ptx']} passes from the store" in done.said
    return found, Path(done.out.strip())


def found_passes(record: Mapping[str, Any]) -> tuple[int, int, int, int]:
    device = record["device_code"]
    return device["text"], device["nvvm"], device["ptx"], device["misses"]


@pytest.mark.slow
@HOST_ONLY
def test_cells_of_other_pythons_and_hosts_take_their_device_code_from_the_first(cells: Farm) -> None:
    """core.cu includes Python.h, so its text differs in each cell."""
    first, _ = built(cells, "--target", "aarch64")
    assert found_passes(first) == (0, 0, 0, 2)
    for options in (["--python", "3.13-trixie", "--target", "aarch64"], ["--target", "x86_64"]):
        record, wheel = built(cells, *options)
        assert found_passes(record) == (0, 1, 1, 0), options
        remove_tree(cells.settings.home / "builds" / record["build_id"] / "record.json")
        kept = wheel.rename(cells.settings.home / wheel.name)
        remove_tree(cells.settings.home / "builds" / record["build_id"])
        without, own = built(cells, "--no-device-store", *options)
        assert found_passes(without) == (0, 0, 0, 2)
        assert without["build_id"] == record["build_id"]
        assert same_but_for_names(rebuild.compare(kept, own)), options
        # A unit's costs are those without the store, by which the next build plans.
        assert record["units"]["core.cu"]["peak_memory"] > without["units"]["core.cu"]["peak_memory"] / 2


def same_but_for_names(comparison: rebuild.Comparison) -> bool:
    """Equal, or only the process id in the names of nvcc's scratch files differs."""
    return all("names of nvcc's temporary files" in difference.where for difference in comparison.differences)


@pytest.mark.slow
def test_a_build_that_was_killed_leaves_a_store_that_gives_the_same_wheel(cells: Farm) -> None:
    settings = cells.settings
    remove_tree(settings.home / "builds")
    remove_tree(device_store.folder(settings, "tiny_cuda"))
    for seen in range(4):  # killed when the store has no, one, two and three entries
        running = start(cells, "build", "tiny_cuda", "--no-compiler-cache", "--target", "aarch64")
        deadline = time.monotonic() + 240
        while len(list(device_store.folder(settings, "tiny_cuda").glob("*/*"))) < seen:
            assert time.monotonic() < deadline
            assert running.poll() is None, running.communicate()
            time.sleep(0.005)
        running.kill()
        running.communicate(timeout=30)
        assert running.returncode == -signal.SIGKILL
    record, wheel = built(cells, "--target", "aarch64")
    kept = wheel.rename(settings.home / wheel.name)
    remove_tree(settings.home / "builds" / record["build_id"])
    _, own = built(cells, "--no-device-store", "--target", "aarch64")
    assert same_but_for_names(rebuild.compare(kept, own))
