"""recipes/triton and recipes/aphrodite build small projects of the same structure, with some values of the recipes changed.

triton: the commit, the tree and the version are those of the small project. Empty archives replace LLVM and json, with their
own digests. `binfmt` and smoke.py are removed, and the stack is cu130. The programs and libraries of CUDA 12.4 for aarch64 are
the recipe's own.
aphrodite: the commit and the tree are those of the small project, and cutlass is a small repository. The project is compiled
by CUDA 12.4.131 through torch's own CMake files, against the headers of torch's CPU wheel (stack cu124-headers), so nothing is
loaded (test_aphrodite_smoke.py does that). The part of the CMake files that the CPU wheel switches off is that of
tests/recipes/aphrodite_objects, a recipe for five CUDA units of the real engine. No test runs it; docs/howto/pinned.md reports
a run ("Tests of these builds").
"""

from __future__ import annotations

import io
import json
import re
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import tomlkit

from builder.fetch import download
from builder.planning import recipe
from tests.conftest import REPOSITORY, Farm
from tests.integration.fetch_kit import Repository, sha256
from tests.integration.pinned_kit import CORE, CORE_CUDA, PYPROJECT
from tests.integration.test_audit_real import published
from tests.integration.test_build import record_of

# What setup.py does with its downloads, as far as a recipe has to know: looks for each, reaches for it if need be, copies.
SETUP = """
import os, platform, shutil, subprocess, urllib.request
from pathlib import Path
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

import pybind11

cache = Path(os.environ["TRITON_HOME"]) / ".triton"
into = Path("triton/backends/nvidia")

def wanted(place, url):
    if not place.exists():
        urllib.request.urlopen(url)

assert platform.machine() == "aarch64"
for name, url in (("llvm/llvm-86b69c31-ubuntu-arm64", "LLVM"), ("json", "JSON")):
    told = cache / name / "version.txt"
    if not told.is_file() or told.read_text() != url:
        urllib.request.urlopen(url)
    wanted(cache / name / "include", url)
for source, target in (
    ("ptxas/bin/ptxas", "bin/ptxas"),
    ("cuobjdump/bin/cuobjdump", "bin/cuobjdump"),
    ("nvdisasm/bin/nvdisasm", "bin/nvdisasm"),
    ("cudacrt/include", "include"),
    ("cudart/include", "include"),
    ("cupti/include", "include"),
    ("cupti/lib", "lib/cupti"),
):
    place = cache / "nvidia" / source
    wanted(place, "https://anaconda.org/" + source)
    if place.is_dir():
        shutil.copytree(place, into / target, dirs_exist_ok=True)
    else:
        (into / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(place, into / target)
(into / "lib/libdevice.10.bc").write_bytes(b"BC")
files = [str(one.relative_to("triton")) for one in into.rglob("*") if one.is_file()]
commit = subprocess.check_output(["git", "rev-parse", "--short=8", "HEAD"], text=True).strip()

class Build(build_ext):
    def get_ext_filename(self, name):
        return name.replace(".", "/") + ".so"

setup(name="triton", version="3.2.0+git" + commit, packages=["triton", "triton.language"], package_data={"triton": files},
      ext_modules=[Extension("triton._C." + name, [name + ".c"]) for name in ("libtriton", "libproton")],
      cmdclass={"build_ext": Build})
"""


def packed(*names: str) -> bytes:
    """A .tar.bz2 of empty files."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:bz2") as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    return raw.getvalue()


TOOLS = ("ptxas", "cuobjdump", "nvdisasm")


def triton_recipe(farm: Farm, mirror: Path) -> tuple[tomlkit.TOMLDocument, str]:
    """The recipe of triton in a project, with files and a repository in the folder `mirror`; the recipe, and the mirrors."""
    document = tomlkit.parse((REPOSITORY / "recipes/triton/recipe.toml").read_text())
    llvm, include = (
        next(file["url"] for file in document["files"] if word in file.get("url", "")) for word in ("llvm", "json")
    )
    replace_downloads(document, mirror)
    repository = Repository(mirror / "github.com/triton-lang/triton")
    modules = {f"python/{name}.c": CORE.replace("NAME", name) for name in ("libtriton", "libproton")}
    packages = {f"python/triton/{name}__init__.py": "" for name in ("", "language/")}
    setup = SETUP.replace("LLVM", llvm).replace("JSON", include)
    commit = repository.commit({"python/setup.py": setup, "python/pyproject.toml": PYPROJECT, **modules, **packages})
    document["source"].update({"commit": commit, "tree": repository.tree(commit)})
    document["version"] = f"3.2.0+git{commit[:8]}"
    for file in document["files"]:
        file.pop("binfmt", None)  # no program of the target runs in this build
    folder = farm.settings.project / "recipes/triton"
    shutil.copytree(REPOSITORY / "recipes/triton", folder)
    (folder / "smoke.py").unlink()  # there is no compiler in it to try
    (folder / "recipe.toml").write_text(tomlkit.dumps(document))
    hosts = {f"https://{str(url).split('/')[2]}/" for url in (llvm, include)}
    return document, " ".join(f"{host}={mirror.as_uri()}/{host.removeprefix('https://')}" for host in sorted(hosts))


def replace_downloads(document: tomlkit.TOMLDocument, mirror: Path) -> None:
    """Write empty archives of LLVM and json to the mirror, and their digests to the recipe."""
    content = {"llvm": packed("llvm-86b69c31-ubuntu-arm64/include/a.h")}
    with zipfile.ZipFile(raw := io.BytesIO(), "w") as opened:
        opened.writestr("include/nlohmann/json.hpp", "")
        opened.writestr("LICENSE.MIT", "MIT License")
    content["json"] = raw.getvalue()
    for file in document["files"]:
        if "url" not in file:
            continue
        name = next(name for name in content if name in file["url"])
        place = mirror / str(file["url"]).removeprefix("https://")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content[name])
        for key in ("sha256_unknown", "witness"):
            file.pop(key, None)
        file["sha256"] = sha256(content[name])


@pytest.mark.slow
def test_triton_as_its_recipe_says_with_nvidias_own_programs_passes_every_gate(farm: Farm, tmp_path: Path) -> None:
    document, mirrors = triton_recipe(farm, tmp_path / "mirror")
    done = farm.run("build", "triton", "--stack", "cu130", GRACEFARM_MIRRORS=mirrors)
    assert done.code == 0, f"{done.said}\n{farm.run('log', 'triton').out[-3000:]}"
    found = record_of(farm, "triton")
    assert {verdict["gate"]: verdict["status"] for verdict in found["verdicts"]} == {  # type: ignore[attr-defined]
        **dict.fromkeys(("wheel", "elf-machine", "python-abi", "platform-tag", "grafted"), "passed"),
        **dict.fromkeys(("licence", "rpath", "alignment", "symbols"), "passed"),
        **dict.fromkeys(("cubins", "variant"), "not applicable"),
    }
    with zipfile.ZipFile(done.out.strip()) as opened:
        licenses = f"triton-{document['version']}.dist-info/licenses/seed"
        assert b"NVIDIA" in opened.read(f"{licenses}/.triton/nvidia/License.txt")
        assert b"Apache License v2.0 with LLVM Exceptions" in opened.read(f"{licenses}/licenses/llvm/LICENSE.TXT")
        assert b"MIT" in opened.read(f"{licenses}/.triton/json/LICENSE.MIT")
        held = {name.removeprefix("triton/backends/nvidia/") for name in opened.namelist()}
    assert {
        *(f"bin/{name}" for name in TOOLS),
        "lib/cupti/libcupti.so",
        "lib/libdevice.10.bc",
        "include/crt/host_defines.h",
    } <= held

    def without(drop: Callable[[dict[str, str]], bool]) -> str:
        changed = tomlkit.parse(tomlkit.dumps(document))
        kept = [file for file in changed["wheel"]["bundled"] if not drop(file)]
        assert len(kept) == len(changed["wheel"]["bundled"]) - 1
        changed["wheel"]["bundled"] = kept
        (farm.settings.project / "recipes/triton/recipe.toml").write_text(tomlkit.dumps(changed))
        again = farm.run("build", "triton", "--stack", "cu130", GRACEFARM_MIRRORS=mirrors)
        assert again.code == 30, again.said
        return again.said

    # Each line of the recipe's table is needed: judged again, without compiling.
    assert "lib/cupti/libcupti.so" in without(lambda one: one["path"].endswith("cupti/*"))
    assert "bin/nvdisasm" in without(lambda one: one["path"].endswith("nvdisasm"))


PUBLISHED = ("triton", "triton-3.5.0-cp311-cp311-manylinux_2_27_aarch64.manylinux_2_28_aarch64.whl")
PUBLISHED_SHA256 = "8457b22148defefdcb7fa8144b05ce211b9faefad650a1ce85b23df488d5549c"


@pytest.mark.slow
def test_the_first_wheel_of_triton_for_aarch64_that_others_published_lacks_only_licences(farm: Farm, tmp_path: Path) -> None:
    """libtriton, libproton, LLVM's plugins and NVIDIA's programs as triton's makers ship them, without licence texts."""
    project, name = PUBLISHED
    stored = download([published(project, name, PUBLISHED_SHA256)], farm.settings)[PUBLISHED_SHA256]
    (tmp_path / name).symlink_to(stored)
    document = tomlkit.parse((REPOSITORY / "recipes/triton/recipe.toml").read_text())
    document["version"] = "3.5.0"
    folder = farm.settings.project / "recipes/triton"
    shutil.copytree(REPOSITORY / "recipes/triton", folder)
    (folder / "recipe.toml").write_text(tomlkit.dumps(document))
    done = farm.run("audit", str(tmp_path / name), "--stack", "cu130", "--recipe", "triton", "--json")
    assert done.code == 30, done.said
    verdicts = next(answer for line in done.out.splitlines() if isinstance(answer := json.loads(line), list))
    assert [verdict["gate"] for verdict in verdicts if verdict["status"] == "failed"] == ["licence"]
    details = {verdict["gate"]: "\n".join(verdict["details"]) for verdict in verdicts}
    for name in ("_C/libtriton", "_C/libproton", "instrumentation/libPrintLoadStoreMemSpaces"):
        assert f"triton/{name}.so: " in details["symbols"]


GENERATES = ("triton", "triton-3.6.0-cp311-cp311-manylinux_2_27_aarch64.manylinux_2_28_aarch64.whl")
GENERATES_SHA256 = "49df5ef37379c0c2b5c0012286f80174fcf0e073e5ade1ca9a86c36814553651"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_recipes_smoke_test_compiles_kernels_by_a_triton_that_others_published(farm: Farm, tmp_path: Path) -> None:
    """Under emulation: to PTX, with wgmma for sm_90, and by the wheel's ptxas to cubins. A failing ptxas is an error."""
    project, name = GENERATES
    stored = download([published(project, name, GENERATES_SHA256)], farm.settings)[GENERATES_SHA256]
    (tmp_path / name).symlink_to(stored)
    shutil.copytree(REPOSITORY / "recipes/triton", farm.settings.project / "recipes/triton")
    command = ("smoke", str(tmp_path / name), "--stack", "cu130", "--recipe", "triton")
    done = farm.run(*command)
    assert done.code == 0, done.said
    for kernel in ("scaled_sum", "row_maximum", "product"):
        assert re.search(rf"{kernel} sm_90: \d+ bytes", done.said), done.said
    script = farm.settings.project / "recipes/triton/smoke.py"
    for text, other, sentence in (
        ('"90": "wgmma.mma_async"', '"90": "tcgen05.mma"', "product for sm_90 has no tcgen05.mma"),
        ("exec {EMULATOR} {TOOLS", "exec {EMULATOR} /bin/false {TOOLS", "ptxas"),
    ):
        whole = script.read_text()
        assert whole.count(text) == 1
        script.write_text(whole.replace(text, other))
        broken = farm.run(*command)
        assert (broken.code, sentence in broken.said) == (31, True), broken.said
        script.write_text(whole)


# The files that upstream compiles for sm_90a as well have its flag here too; the instruction is one of those that want it.
ENGINE_CMAKE = """
cmake_minimum_required(VERSION 3.26)
project(engine LANGUAGES CXX)
list(APPEND CMAKE_PREFIX_PATH /env/lib/python3.11/site-packages/torch/share/cmake)
list(APPEND CMAKE_MODULE_PATH ${CMAKE_SOURCE_DIR}/cmake/torch)
find_package(Torch REQUIRED)
find_package(CUDA REQUIRED)
find_package(CUDAToolkit REQUIRED)
include(FetchContent)
FetchContent_Declare(cutlass GIT_REPOSITORY https://github.com/nvidia/cutlass.git GIT_TAG v3.5.1)
FetchContent_MakeAvailable(cutlass)
find_package(Python REQUIRED COMPONENTS Interpreter Development.Module Development.SABIModule)
set(special machete_mm_impl_part0.cu machete_prepack_part0.cu scaled_mm_c2x.cu scaled_mm_c3x.cu)
set_source_files_properties(${special} PROPERTIES COMPILE_FLAGS "-gencode arch=compute_90a,code=sm_90a")
set(_moe_C_parts softmax.cu)
set(_C_parts gptq_marlin.cu machete_pytorch.cu ${special})
foreach(name _core_C _moe_C _C)
    Python_add_library(${name} MODULE USE_SABI 3.8 ${name}.cpp ${${name}_parts})
    target_include_directories(${name} PRIVATE ${cutlass_SOURCE_DIR}/include)
    set_target_properties(${name} PROPERTIES PREFIX "" SUFFIX .abi3.so)
endforeach()
target_link_libraries(_moe_C PRIVATE CUDA::cudart)
target_link_libraries(_C PRIVATE torch CUDA::cudart CUDA::cublas CUDA::cuda_driver)
"""
ENGINE_SETUP = """
import os, shutil, subprocess
from pathlib import Path
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

assert os.environ["APHRODITE_TARGET_DEVICE"] == "cuda"
commit = subprocess.check_output(["git", "rev-parse", "HEAD"], text=True).strip()
Path("aphrodite/commit_id.py").write_text(f"__commit__ = {commit!r}\\n")

class Build(build_ext):
    def run(self):
        kind = "-DCMAKE_BUILD_TYPE=" + os.environ["CMAKE_BUILD_TYPE"]
        subprocess.run(["cmake", "-G", "Ninja", kind, "-S", ".", "-B", "build/cmake"], check=True)
        subprocess.run(["cmake", "--build", "build/cmake", "-j", os.environ["MAX_JOBS"]], check=True)
        into = Path(self.build_lib) / "aphrodite"
        into.mkdir(parents=True, exist_ok=True)
        for name in ("_core_C", "_moe_C", "_C"):
            shutil.copy(f"build/cmake/{name}.abi3.so", into)

requires = ["torch==2.4.0", "triton>=2.2.1", 'aphrodite-flash-attn==2.6.1.post2; platform_machine == "x86_64"']
setup(name="aphrodite-engine", version="0.6.4.post1", packages=["aphrodite"], install_requires=requires,
      ext_modules=[Extension("aphrodite._C", [])], cmdclass={"build_ext": Build})
"""
KERNEL = """
#include "cute.h"
__global__ void NAME() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    asm volatile("setmaxnreg.inc.sync.aligned.u32 64;");
#endif
}
void start_NAME() { NAME<<<1, 1>>>(); }
"""


@pytest.mark.slow
def test_aphrodite_as_its_recipe_says_compiles_by_cuda_12_4_for_the_architectures_of_its_table(
    farm: Farm, tmp_path: Path
) -> None:
    document = tomlkit.parse((REPOSITORY / "recipes/aphrodite/recipe.toml").read_text())
    hub = tmp_path / "mirror/github.com"
    cutlass = Repository(hub / "NVIDIA/cutlass")
    header = {
        "include/cute.h": "#define CUTE 1\n",
        "LICENSE.txt": "BSD 3-Clause\n",
        "CMakeLists.txt": "cmake_minimum_required(VERSION 3.25)\n",
    }
    document["repositories"][0]["commit"] = cutlass.commit(header)
    machete = ("machete_mm_impl_part0", "machete_prepack_part0", "machete_pytorch")
    kernels = ("softmax", "gptq_marlin", *machete, "scaled_mm_c2x", "scaled_mm_c3x")
    bindings = {name: CORE.replace("NAME", name).replace("#include <Python", LIMITED) for name in ("_core_C", "_moe_C")}
    bindings["_C"] = CORE_CUDA.replace("__global__ void kernel() {}", "").replace("kernel<<<1, 1>>>();", "")
    for_headers = recipe.load(REPOSITORY / "tests/recipes", "aphrodite_objects").data
    repository = Repository(hub / "PygmalionAI/aphrodite-engine")
    commit = repository.commit(
        {
            "setup.py": ENGINE_SETUP,
            "pyproject.toml": PYPROJECT.replace('"setuptools"', '"setuptools", "cmake>=3.26", "torch==2.4.0"'),
            "CMakeLists.txt": ENGINE_CMAKE,
            **{file.path: file.text for file in for_headers.files if file.text},
            "aphrodite/__init__.py": "",
            document["substitutions"][0]["path"]: document["substitutions"][0]["find"],
            **{f"{name}.cpp": text for name, text in bindings.items()},
            **{f"{name}.cu": KERNEL.replace("NAME", name) for name in kernels},
        }
    )
    document["source"].update({"commit": commit, "tree": repository.tree(commit)})
    folder = farm.settings.project / "recipes/aphrodite"
    shutil.copytree(REPOSITORY / "recipes/aphrodite", folder)
    (folder / "recipe.toml").write_text(tomlkit.dumps(document))
    mirrors = f"https://={(tmp_path / 'mirror').as_uri()}/"
    done = farm.run("build", "aphrodite", "--stack", "cu124-headers", GRACEFARM_MIRRORS=mirrors)
    assert done.code == 0, f"{done.said}\n{farm.run('log', 'aphrodite').out[-3000:]}"
    verdicts = {verdict["gate"]: verdict for verdict in record_of(farm, "aphrodite")["verdicts"]}  # type: ignore[attr-defined]
    assert verdicts["cubins"]["summary"] == "cubins for exactly sm_90, sm_90a, and no PTX"
    assert verdicts["cubins"]["details"] == [
        "aphrodite/_C.abi3.so: 6 for sm_90, 4 for sm_90a",
        "aphrodite/_moe_C.abi3.so: 1 for sm_90",
    ]
    wheel = Path(done.out.strip())
    with zipfile.ZipFile(wheel) as opened:
        (place,) = (name for name in opened.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = opened.read(place).decode()
        assert commit in opened.read("aphrodite/commit_id.py").decode()
    assert [line for line in metadata.splitlines() if line.startswith("Requires-Dist")] == [
        "Requires-Dist: torch==2.4.0",
        "Requires-Dist: aphrodite-flash-attn==2.6.1.post2",
        "Requires-Dist: triton==3.2.0+git755d4164",
    ]
    with tarfile.open(next(wheel.parent.glob("*.tar.gz"))) as tar:
        assert "aphrodite_engine-0.6.4.post1+cu124.torch2.4/.deps/cutlass/include/cute.h" in tar.getnames()


LIMITED = "#define Py_LIMITED_API 0x03080000\n#include <Python"
