"""Sources and recipes of small projects like triton and aphrodite-engine, for the tests of the pinned builds."""

from __future__ import annotations

import io
import shutil
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

from builder.box.sandbox import Sandbox
from builder.flow.root_stage import lay_ground
from builder.planning import recipe, stack
from builder.planning.plan import NO_CACHES
from builder.planning.stack import Arch, host_arch
from builder.toolchains import choice
from gracefarm.console import Console
from tests import projects
from tests.conftest import Farm
from tests.integration.fetch_kit import Repository, sha256

NATIVE = host_arch().value
UPSTREAM = "https://git.example/"
URL = "https://blobs.example/tool.tar.gz"
PYPROJECT = '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'

# This setup.py downloads files unless it finds them, ignores errors of git, and has an extension without CPython's suffix.
TRITON = """
import os, shutil, subprocess, sys, urllib.request
from pathlib import Path
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

def suffix():
    try:
        done = subprocess.check_output(["git", "rev-parse", "--short=8", "HEAD"], stderr=subprocess.DEVNULL)
        return "+git" + done.decode().strip()
    except Exception:
        return ""

cache = Path(os.environ.get("TRITON_HOME", os.environ["HOME"])) / ".triton"
tool = cache / "nvidia" / "ptxas" / "bin" / "ptxas"
into = Path("trinity/backends/bin")
if not os.environ.get("TRITON_OFFLINE_BUILD"):
    if not tool.is_file():
        urllib.request.urlopen("URL")
    into.mkdir(parents=True, exist_ok=True)
    shutil.copy(tool, into / "ptxas")
version = cache / "llvm" / "llvm-1" / "version.txt"
if not os.environ.get("TRITON_OFFLINE_BUILD") and not (version.is_file() and version.read_text() == "URL"):
    urllib.request.urlopen("URL")

class Build(build_ext):
    def get_ext_filename(self, name):
        return name.replace(".", "/") + ".so"

setup(name="trinity", version="3.2.0" + suffix(), packages=["trinity"], package_data={"trinity": ["backends/bin/*"]},
      ext_modules=[Extension("trinity._C.libtrinity", ["core.c"])], cmdclass={"build_ext": Build})
""".replace("URL", URL)
CORE = """
#include <Python.h>
#include <stdlib.h>
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "NAME", 0, -1, 0};
PyMODINIT_FUNC PyInit_NAME(void) { if (getenv("NEVER_SET")) abort(); return PyModule_Create(&module); }
"""


def archive(files: dict[str, str]) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:bz2") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(text), 0o755
            tar.addfile(info, io.BytesIO(text.encode()))
    return raw.getvalue()


def git_recipe(farm: Farm, name: str, repository: Repository, commit: str, **tables: object) -> None:
    """Write a recipe whose source is a repository at UPSTREAM. A mirror has this repository."""
    url = UPSTREAM + repository.folder.name
    source = {"kind": "git", "url": url, "commit": commit, "tree": repository.tree(commit), **tables.pop("source", {})}  # type: ignore[dict-item]
    farm.recipe(name, {}, source=source, **tables)


def mirrors(tmp_path: Path) -> dict[str, str]:
    return {"GRACEFARM_MIRRORS": f"{UPSTREAM}={tmp_path.as_uri()}/ https://blobs.example/={tmp_path.as_uri()}/"}


def trinity(farm: Farm, tmp_path: Path, **tables: object) -> str:
    """Write the repository, the seed and the recipe of a project like triton. Return the first eight digits of the commit."""
    (tmp_path / "tool.tar.gz").write_bytes(tool := archive({"bin/ptxas": "#!/bin/sh\necho release 12.4\n", "bin/other": ""}))
    repository = Repository(tmp_path / "triton")
    commit = repository.commit(
        {
            "python/setup.py": TRITON,
            "python/pyproject.toml": PYPROJECT,
            "python/core.c": CORE.replace("NAME", "libtrinity"),
            "python/trinity/__init__.py": "",
        }
    )
    (farm.settings.project / "seed").mkdir(exist_ok=True)
    files = [
        {
            "url": URL,
            "sha256": sha256(tool),
            "path": "seed/.triton/nvidia",
            "members": {"bin/ptxas": "ptxas/bin/ptxas"},
            "license": "MIT",
        },
        {"text": URL, "path": "seed/.triton/llvm/llvm-1/version.txt"},
    ]
    values: dict[str, object] = {
        "version": f"3.2.0+git{commit[:8]}",
        "files": files,
        "build": {"cuda": False, "subdirectory": "python", "environment": {"TRITON_HOME": "/build/source/seed"}},
        "wheel": {"bundled": [{"path": "trinity/backends/bin/ptxas", "origin": URL, "license": "MIT"}]},
        "smoke": {"imports": ["trinity", "trinity._C.libtrinity"]},
    }
    git_recipe(farm, "trinity", repository, commit, **(values | tables))
    return commit[:8]


def place(farm: Farm, name: str, folder: Path, sm: tuple[str, ...] | None = None) -> Sandbox:
    """The sandbox of a build for aarch64 with this stack, with `folder` as working folder."""
    farm.recipe("tiny", projects.backend("pass"), stack=name, build={"cuda": True})
    loaded = replace(stack.load(farm.settings.project / "stacks", name), asked_sm=sm)
    made = choice.make_plan(recipe.load(farm.settings.project / "recipes", "tiny"), loaded, host_arch(), Arch.AARCH64)
    ground = lay_ground(made, farm.settings, Console())
    (folder / "tmp").mkdir(parents=True)
    box = made.toolchain.place(made, ground, farm.settings, folder, jobs=1, epoch=1, memory=4 << 30, caches=NO_CACHES)
    assert isinstance(box, Sandbox)
    return box


CMAKE = """
cmake_minimum_required(VERSION 3.25)
project(engine C)
include(FetchContent)
FetchContent_Declare(cutlass GIT_REPOSITORY https://git.example/cutlass.git GIT_TAG v1)
FetchContent_MakeAvailable(cutlass)
find_package(Python3 REQUIRED COMPONENTS Development.Module)
file(WRITE ${CMAKE_BINARY_DIR}/stub.c "int cuPointerGetAttribute(void) { return 0; }")
add_library(cuda SHARED ${CMAKE_BINARY_DIR}/stub.c)
set_target_properties(cuda PROPERTIES SOVERSION 1)
Python3_add_library(_C MODULE core.c)
target_include_directories(_C PRIVATE ${cutlass_SOURCE_DIR}/include)
target_link_libraries(_C PRIVATE cuda)
set_target_properties(_C PROPERTIES PREFIX "" SUFFIX .abi3.so SKIP_BUILD_RPATH ON LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR})
"""
ENGINE = """
import shutil, subprocess
from pathlib import Path
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

class Build(build_ext):
    def run(self):
        subprocess.run(["cmake", "-S", ".", "-B", "build/cmake"], check=True)
        subprocess.run(["cmake", "--build", "build/cmake"], check=True)
        into = Path(self.build_lib) / "engine"
        into.mkdir(parents=True, exist_ok=True)
        shutil.copy("build/cmake/_C.abi3.so", into)

requires = ["triton>=2.2.1", "torch==2.4.0", 'flashy==2.6.1.post2; platform_machine == "x86_64"']
setup(name="engine", version="0.6.4.post1", packages=["engine"], install_requires=requires,
      ext_modules=[Extension("engine._C", [])], cmdclass={"build_ext": Build})
"""
SMOKE = """
import ctypes, glob, os, subprocess, sys
open("/tmp/cuda.c", "w").write("int cuPointerGetAttribute(void) { return 0; }")
subprocess.run(["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", "/tmp/libcuda.so.1", "/tmp/cuda.c"], check=True)
ctypes.CDLL("/tmp/libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
import engine._C
print(engine._C.__file__.rpartition("/")[2])
"""


def engine(farm: Farm, tmp_path: Path) -> None:
    """Write the repositories and the recipe of a project like aphrodite-engine."""
    cutlass = Repository(tmp_path / "cutlass")
    inner = cutlass.commit({"include/cute.h": "#define CUTE 1\n", "CMakeLists.txt": "cmake_minimum_required(VERSION 3.25)\n"})
    repository = Repository(tmp_path / "engine")
    core = '#define Py_LIMITED_API 0x03080000\n#include "cute.h"\nint cuPointerGetAttribute(void);\n' + CORE.replace(
        "NAME", "_C"
    )
    core = core.replace("return Py", "cuPointerGetAttribute(); return Py")
    commit = repository.commit(
        {"setup.py": ENGINE, "pyproject.toml": PYPROJECT, "CMakeLists.txt": CMAKE, "core.c": core, "engine/__init__.py": ""}
    )
    git_recipe(
        farm,
        "engine",
        repository,
        commit,
        version="0.6.4.post1",
        repositories=[{"url": f"{UPSTREAM}cutlass", "commit": inner, "path": ".deps/cutlass", "license": "MIT"}],
        build={"cuda": False, "cmake": {"FETCHCONTENT_SOURCE_DIR_CUTLASS": "/build/source/.deps/cutlass"}},
        wheel={"source_archive": True, "requires": {"flashy": "flashy==2.6.1.post2", "triton": "triton==3.2.0+git755d4164"}},
        smoke={"imports": ["engine"]},
    )
    (farm.settings.project / "recipes/engine/smoke.py").write_text(SMOKE)


def own_stack(farm: Farm, target: str) -> Path:
    """Write the stack `own`. Its environment has own-thing from a separate index, with unknown digest. Return stack.toml."""
    stacks = farm.settings.project / "stacks"
    shutil.copytree(stacks / "bare", stacks / "own")
    place = stacks / "own" / "stack.toml"
    text = (
        place.read_text()
        .replace('name = "bare"', 'name = "own"', 1)
        .replace('requirements = ["build"', 'requirements = ["own-thing==1.0", "build"', 1)
    )
    own = f'[[environment.wheels]]\nname = "own-thing"\nversion = "1.0"\narch = "{target}"\n'
    own += 'index = "https://torch.example/whl/cu124"\nsha256_unknown = "not reached"\n\n'
    place.write_text(text.replace("[toolchain]\n", f"{own}[toolchain]\n", 1))
    return place


def with_driver(farm: Farm, folder: Path, target: str) -> dict[str, str]:
    """Write the stack `own` with a cuda.h, which declares the driver's functions. Return the mirrors for this stack."""
    own_stack(farm, target)
    own_wheel(folder / "index", **{"nvidia/cu13/include/cuda.h": "CUresult cuPointerGetAttribute(void);\n"})
    variables = mirrors(folder)
    variables["GRACEFARM_MIRRORS"] += f" https://torch.example/whl/cu124={(folder / 'index').as_uri()}"
    locked = farm.run("lock", "own", "--digests", **variables)
    assert locked.code == 0, locked.said
    return variables


def own_wheel(folder: Path, **files: str) -> bytes:
    """Write a wheel and a simple index in a folder, like torch's index for a CUDA release. Return the bytes of the wheel."""
    raw = io.BytesIO()
    content = {
        **files,
        "own_thing/__init__.py": "answer = 42\n",
        "own_thing-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: own-thing\nVersion: 1.0\n",
        "own_thing-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(raw, "w") as opened:
        for name, text in content.items():
            opened.writestr(name, text)
        rows = "".join(f"{name},,\n" for name in [*content, "own_thing-1.0.dist-info/RECORD"])
        opened.writestr("own_thing-1.0.dist-info/RECORD", rows)
    page = folder / "own-thing"
    page.mkdir(parents=True)
    (page / "own_thing-1.0-py3-none-any.whl").write_bytes(raw.getvalue())
    (page / "index.html").write_text('<a href="own_thing-1.0-py3-none-any.whl">own_thing-1.0-py3-none-any.whl</a>')
    return raw.getvalue()


TORCH_CMAKE = """
cmake_minimum_required(VERSION 3.26)
project(engine LANGUAGES CXX)
set(USE_CUDA ON)
set(caffe2 /env/lib/python3.11/site-packages/torch/share/cmake/Caffe2)
include(${caffe2}/public/utils.cmake)
include(${caffe2}/public/cuda.cmake)
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
find_package(Python REQUIRED COMPONENTS Interpreter Development.Module Development.SABIModule)
Python_add_library(_C MODULE USE_SABI 3.8 core.cu)
target_link_libraries(_C PRIVATE CUDA::cudart CUDA::cublas CUDA::cuda_driver)
set_target_properties(_C PROPERTIES PREFIX "" SUFFIX .abi3.so)
"""
CORE_CUDA = """
#define Py_LIMITED_API 0x03080000
#include <Python.h>
#include <cuda.h>
#include <cublas_v2.h>
__global__ void kernel() {}
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", 0, -1, 0};
PyMODINIT_FUNC PyInit__C(void) {
    CUcontext context;
    kernel<<<1, 1>>>();
    if (cuCtxGetCurrent(&context) != CUDA_SUCCESS) cublasCreate_v2(nullptr);
    return PyModule_Create(&module);
}
"""
