"""Projects of the shapes of triton, aphrodite_flash_attn and aphrodite-engine, out of git repositories by mirrors, through the
real pipeline; and the traps of their builds, each reproduced and shown closed.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from builder.box import sandbox
from builder.box.sandbox import Sandbox
from builder.flow import run
from builder.flow.root_stage import lay_ground
from builder.ground import root
from builder.planning import gaps, packages, pins, recipe, stack
from builder.planning.plan import NO_CACHES, Wanted
from builder.planning.stack import Arch, host_arch
from builder.toolchains import choice, host_tools
from builder.toolchains.container import ContainerToolchain
from builder.toolchains.host import HostToolchain
from gracefarm.console import Console
from gracefarm.errors import ConfigError, HostError
from gracefarm.files import remove_tree
from tests import projects
from tests.conftest import REPOSITORY, Farm
from tests.gaps_kit import GAPS, put_back
from tests.integration.fetch_kit import Repository, sha256
from tests.integration.test_toolchain_host import python311

NATIVE = host_arch().value
UPSTREAM = "https://git.example/"
URL = "https://blobs.example/tool.tar.gz"
PYPROJECT = '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'

# Downloads on import unless it finds what it wants, swallows git's errors, has an extension without CPython's suffix.
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


@pytest.fixture
def unread(tmp_path: Path) -> Path:
    """A copy of the committed recipes and stacks with every gap in it."""
    for name in ("recipes", "stacks"):
        shutil.copytree(REPOSITORY / name, tmp_path / "unread" / name)
    put_back(tmp_path / "unread")
    return tmp_path / "unread"


def archive(files: dict[str, str]) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:bz2") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(text), 0o755
            tar.addfile(info, io.BytesIO(text.encode()))
    return raw.getvalue()


def git_recipe(farm: Farm, name: str, repository: Repository, commit: str, **tables: object) -> None:
    """A recipe whose source is a repository that a mirror stands for."""
    url = UPSTREAM + repository.folder.name
    source = {"kind": "git", "url": url, "commit": commit, "tree": repository.tree(commit), **tables.pop("source", {})}  # type: ignore[dict-item]
    farm.recipe(name, {}, source=source, **tables)


def mirrors(tmp_path: Path) -> dict[str, str]:
    return {"GRACEFARM_MIRRORS": f"{UPSTREAM}={tmp_path.as_uri()}/ https://blobs.example/={tmp_path.as_uri()}/"}


def trinity(farm: Farm, tmp_path: Path, **tables: object) -> str:
    """The repository, the seed and the recipe of a project of triton's shape; the commit's first eight digits."""
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


def names(wheel: str) -> list[str]:
    with zipfile.ZipFile(wheel.strip()) as opened:
        return opened.namelist()


def test_preseeded_downloads_need_no_network_and_still_end_up_in_the_wheel(farm: Farm, tmp_path: Path) -> None:
    commit = trinity(farm, tmp_path)
    done = farm.run("build", "trinity", "--target", "aarch64", **mirrors(tmp_path))
    assert done.code == 0, done.said
    assert f"trinity-3.2.0+git{commit}-cp311" in done.out
    assert {"trinity/backends/bin/ptxas", "trinity/_C/libtrinity.so"} <= set(names(done.out))
    assert "trinity/backends/bin/other" not in names(done.out)


def test_trap_a_download_that_is_not_preseeded_ends_the_build_by_name(farm: Farm, tmp_path: Path) -> None:
    trinity(farm, tmp_path, files=[], wheel={})
    done = farm.run("build", "trinity", "--target", NATIVE, **mirrors(tmp_path))
    assert done.code == 20, done.said
    assert "blobs.example" in done.said


def test_trap_an_offline_build_that_loses_the_tools_is_refused(farm: Farm, tmp_path: Path) -> None:
    build = {"cuda": False, "subdirectory": "python", "environment": {"TRITON_OFFLINE_BUILD": "1"}}
    trinity(farm, tmp_path, build=build)
    done = farm.run("build", "trinity", "--target", NATIVE, **mirrors(tmp_path))
    assert done.code == 30, done.said
    assert "trinity/backends/bin/ptxas is declared, but not in the wheel" in done.said


def test_trap_1_a_commit_that_loses_its_suffix_is_not_taken_for_the_release(farm: Farm, tmp_path: Path) -> None:
    commit = trinity(farm, tmp_path)
    exported = {
        "pyproject.toml": PYPROJECT,
        "setup.py": TRITON,
        "core.c": CORE.replace("NAME", "libtrinity"),
        "trinity/__init__.py": "",
    }
    farm.recipe(
        "exported",
        exported,
        name="trinity",
        version=f"3.2.0+git{commit}",
        build={"cuda": False, "environment": {"TRITON_OFFLINE_BUILD": "1"}},
        smoke={"imports": ["trinity"]},
    )
    done = farm.run("build", "exported", "--target", NATIVE)
    assert done.code == 30, done.said
    assert "3.2.0" in done.said
    assert f"3.2.0+git{commit}" in done.said


def test_trap_2_a_branch_and_a_tag_of_one_name_do_not_matter_to_a_pinned_commit(farm: Farm, tmp_path: Path) -> None:
    repository = Repository(tmp_path / "engine")
    body = "commit = subprocess.check_output(['git', 'rev-parse', 'HEAD'], text=True).strip()\n"
    body += "return wheel(wheel_directory, files={'tiny/commit_id.py': commit.encode()})"
    tagged = repository.commit({name: str(text) for name, text in projects.backend(body).items()})
    repository.git("tag", "v0.6.4.post1")
    repository.git("checkout", "--quiet", "-b", "v0.6.4.post1")
    repository.git("commit", "--quiet", "--allow-empty", "--message", "the branch's own")
    branch = repository.git("rev-parse", "HEAD")
    assert branch != tagged
    assert repository.tree(branch) == repository.tree(tagged)
    git_recipe(farm, "tiny", repository, tagged)
    done = farm.run("build", "tiny", "--target", NATIVE, **mirrors(tmp_path))
    assert done.code == 0, done.said
    with zipfile.ZipFile(done.out.strip()) as opened:
        assert opened.read("tiny/commit_id.py").decode() == tagged
    git_recipe(farm, "named", repository, tagged, source={"commit": "v0.6.4.post1"})
    assert farm.run("plan", "named").code == 3


def test_trap_3_the_cpu_torch_of_the_same_version_is_refused(farm: Farm) -> None:
    place = farm.settings.project / "stacks" / "cu124-headers" / "stack.toml"
    gate = f'cuda = "{stack.load(REPOSITORY / "stacks", "cu124").data.torch.cuda}"'  # type: ignore[union-attr]
    place.write_text(place.read_text().replace('version = "2.4.0"\n', f'version = "2.4.0"\n{gate}\n', 1))
    requires = {"requires": {"torch": "torch==2.4.0"}}
    farm.recipe("tiny", projects.backend("return wheel(wheel_directory)"), stack="cu124-headers", wheel=requires)
    done = farm.run("build", "tiny")
    assert done.code == 12, done.said
    assert "the locked torch 2.4.0 is built for CUDA None, but the stack has CUDA 12.4" in done.said


def test_trap_4_a_build_requirement_that_the_tutorial_forgets_is_named_before_anything_compiles(farm: Farm) -> None:
    files = {
        "pyproject.toml": PYPROJECT.replace('"setuptools"', '"setuptools", "pybind11>=2.13.1"'),
        "setup.py": "import pybind11",
    }
    farm.recipe("tiny", files)
    done = farm.run("build", "tiny", "--target", NATIVE)
    assert done.code == 21, done.said
    assert "requires 'pybind11>=2.13.1'" in done.said
    assert "pybind11" in (REPOSITORY / "stacks/cu124/requirements.lock").read_text()


def test_trap_5_an_extension_whose_import_error_is_swallowed_is_imported_by_name(farm: Farm) -> None:
    broken = CORE.replace("NAME", "_C").replace(
        "return PyModule_Create(&module);", 'PyErr_SetString(PyExc_ImportError, "broken"); return 0;'
    )
    files = {
        "pyproject.toml": PYPROJECT,
        "setup.py": "from setuptools import Extension, setup\n"
        "setup(name='engine', version='1.0', packages=['engine'], ext_modules=[Extension('engine._C', ['core.c'])])\n",
        "core.c": broken,
        "engine/__init__.py": "try:\n    import engine._C\nexcept ImportError:\n    pass\n",
    }
    farm.recipe("engine", files, smoke={"imports": ["engine"]})
    assert farm.run("build", "engine", "--target", NATIVE).code == 0
    wheel = farm.run("build", "engine", "--target", NATIVE).out.strip()
    done = farm.run("smoke", wheel, "--stack", "bare", "--import", "engine._C")
    assert done.code == 31, done.said
    assert "broken" in done.said


def place(farm: Farm, name: str, folder: Path, sm: tuple[str, ...] | None = None) -> Sandbox:
    """The sandbox of a build for aarch64 against that stack, with `folder` as its working folder."""
    farm.recipe("tiny", projects.backend("pass"), stack=name, build={"cuda": True})
    loaded = replace(stack.load(farm.settings.project / "stacks", name), asked_sm=sm)
    made = choice.make_plan(recipe.load(farm.settings.project / "recipes", "tiny"), loaded, host_arch(), Arch.AARCH64)
    ground = lay_ground(made, farm.settings, Console())
    (folder / "tmp").mkdir(parents=True)
    box = made.toolchain.place(made, ground, farm.settings, folder, jobs=1, epoch=1, memory=4 << 30, caches=NO_CACHES)
    assert isinstance(box, Sandbox)
    return box


def test_trap_6_the_roots_headers_are_older_than_what_cuda_12_4_cannot_read(farm: Farm, tmp_path: Path) -> None:
    """A name of glibc 2.38's bits/math-vector.h, which gcc knows and nvcc's front end does not; the root's own headers pass.

    The whole of glibc 2.41's headers is in test_pinned_long.py.
    """
    loaded = stack.load(REPOSITORY / "stacks", "cu124")
    for host in (Arch.X86_64, Arch.AARCH64):
        (version,) = {
            package.version for package in packages.of_root(loaded, host, Arch.AARCH64) if package.name == "libc6-dev"
        }
        assert tuple(map(int, version.partition("-")[0].split("+")[0].split("."))) < (2, 38), version
    box = place(farm, "cu124-headers", tmp_path / "work")
    newer = "#ifdef __aarch64__\ntypedef __Float32x4_t f32x4;\n#endif\n"
    (tmp_path / "work/newer.cu").write_text(newer + "__global__ void kernel() {}\n")
    (tmp_path / "work/newer.cpp").write_text(newer)
    (tmp_path / "work/own.cu").write_text("#include <cmath>\n__global__ void kernel(float *x) { *x = sinf(*x); }\n")
    log = tmp_path / "log.txt"
    assert sandbox.run(box, ["/cuda/bin/nvcc", "-c", "own.cu", "-o", "own.o"], log=log).returncode == 0, log.read_text()
    assert sandbox.run(box, ["g++", "-c", "newer.cpp", "-o", "newer.o"], log=log).returncode == 0, log.read_text()
    assert sandbox.run(box, ["/cuda/bin/nvcc", "-c", "newer.cu", "-o", "newer.o"], log=log).returncode != 0
    assert "__Float32x4_t" in log.read_text()


OLD_LIBRARY = """
aarch64-linux-gnu-g++ -O1 newer.cpp -o newer
echo 'GLIBCXX_3.4.25 { global: *; };' > old.map
echo 'int nothing;' > old.c
aarch64-linux-gnu-gcc -shared -fPIC -Wl,-soname,libstdc++.so.6 -Wl,--version-script,old.map -o libstdc++.so.6 old.c
run="/usr/bin/qemu-aarch64-static"
[ -x $run ] || run=
$run ./newer && echo "the root's library has it"
LD_LIBRARY_PATH= $run ${run:+-E LD_LIBRARY_PATH=/build} ./newer
[ -n "$run" ] || LD_LIBRARY_PATH=/build ./newer
"""


def test_trap_7_the_roots_cpp_library_is_new_enough_for_the_prebuilt_llvm(farm: Farm, tmp_path: Path) -> None:
    """A program that needs GLIBCXX_3.4.26, as mlir-tblgen does, starts in the root and not where the library is older."""
    box = place(farm, "cu124-headers", tmp_path / "work")
    for base in (box.root, root.ensure(stack.load(REPOSITORY / "stacks", "cu124"), host_arch(), Arch.AARCH64, farm.settings)):
        assert b"GLIBCXX_3.4.26\0" in (base / "usr/lib/aarch64-linux-gnu/libstdc++.so.6").read_bytes()
    # std::filesystem came into the library with that version.
    (tmp_path / "work/newer.cpp").write_text(
        "#include <filesystem>\nint main(int, char **words) { return std::filesystem::exists(words[0]) ? 0 : 1; }\n"
    )
    log = tmp_path / "log.txt"
    sandbox.run(box, ["/bin/bash", "-c", OLD_LIBRARY], log=log)
    assert "the root's library has it" in log.read_text()
    assert "version `GLIBCXX_3.4.26' not found" in log.read_text()


@pytest.mark.parametrize(
    ("arch", "cuda", "glibc", "reads"),
    [
        *((Arch.AARCH64, "12.4", glibc, glibc < "2.38") for glibc in ("2.28", "2.35", "2.37", "2.38", "2.39", "2.41")),
        (Arch.AARCH64, "13.0", "2.41", True),
        (Arch.X86_64, "12.4", "2.39", True),
    ],
)
def test_trap_6_is_said_before_a_host_build_begins(arch: Arch, cuda: str, glibc: str, reads: bool) -> None:
    if reads:
        host_tools.check_headers(arch, cuda, glibc)
        return
    with pytest.raises(HostError, match=rf"CUDA 12\.4 cannot read the headers of glibc {glibc} on aarch64"):
        host_tools.check_headers(arch, cuda, glibc)


def test_trap_6_is_asked_of_the_machine_itself(farm: Farm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a fake nvcc and an architecture and a glibc that are not this machine's."""
    nvcc = tmp_path / "cuda/bin/nvcc"
    (tmp_path / "cuda/include").mkdir(parents=True)
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.4, V12.4.131'\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(host_tools, "host_arch", lambda: Arch.AARCH64)
    monkeypatch.setattr(os, "confstr", lambda _: "glibc 2.39")
    wanted = Wanted(python=Path(python311()), cuda=tmp_path / "cuda")
    with pytest.raises(HostError, match=r"headers of glibc 2\.39"):
        host_tools.find(stack.load(farm.settings.project / "stacks", "cu124"), wanted, cuda=True)
    assert host_tools.find(stack.load(farm.settings.project / "stacks", "cu124"), wanted, cuda=False).glibc == "2_39"


def test_trap_7_triton_is_refused_in_a_container(farm: Farm) -> None:
    triton = recipe.load(REPOSITORY / "recipes", "triton")
    base = stack.load(REPOSITORY / "stacks", "cu124")
    contained = ContainerToolchain(engine="podman", cibuildwheel="4")
    with pytest.raises(ConfigError, match=r"triton cannot be built with --toolchain container: .*GLIBCXX_3\.4\.26") as refused:
        choice.make_plan(triton, base, Arch.AARCH64, Arch.AARCH64, contained)
    assert refused.value.remedy == "choose a different --toolchain: sandbox, host"
    choice.make_plan(triton, base, Arch.AARCH64, Arch.AARCH64)
    choice.make_plan(recipe.load(REPOSITORY / "recipes", "flash_attn"), base, Arch.AARCH64, Arch.AARCH64, contained)
    bare = stack.load(farm.settings.project / "stacks", "bare")
    here = HostToolchain.find(bare, Wanted(python=Path(python311())), cuda=False)
    changed = replace(triton, data=triton.data.model_copy(update={"refuses": {"host": "why"}}))
    assert choice.make_plan(triton, bare, host_arch(), host_arch(), here).toolchain is here
    with pytest.raises(ConfigError, match="cannot be built with --toolchain host: why"):
        choice.make_plan(changed, bare, host_arch(), host_arch(), here)


@pytest.mark.parametrize("name", ["triton", "flash_attn", "aphrodite"])
def test_the_plan_shows_every_digest_or_the_named_gap(name: str) -> None:
    done = projects.run_builder(["plan", name], {"GRACEFARM_PROJECT": str(REPOSITORY)})
    assert done.code == 0, done.said
    data = recipe.load(REPOSITORY / "recipes", name).data
    assert data.source.kind == "git"
    assert {data.source.commit, data.source.tree} <= set(re.findall(r"[0-9a-f]{40}", done.out))
    for repository in (*data.repositories, *data.source.submodules.values()):
        assert repository.commit in done.out
    for file in data.files:
        if file.origin:
            assert (file.sha256 or "") in done.out
            gap = [line for line in done.out.splitlines() if line.startswith("no digest ") and file.origin in line]
            assert bool(gap) == (file.sha256 is None), file.origin
    torch = [line for line in done.out.splitlines() if line.startswith("no digest torch")]
    known = {wheel.name: wheel for wheel in pins.wheels(stack.load(REPOSITORY / "stacks", "cu124"), Arch.AARCH64)}
    assert bool(torch) == (not known["torch"].sha256 and name != "triton")


FLASH = """
import subprocess
from setuptools import Extension, setup
subprocess.run(["git", "submodule", "update", "--init", "csrc/cutlass"])
flags = []
flags.append("-DSM80")
flags.append("-DSM90")
setup(name="flashy", version="2.6.1.post2", packages=["flashy"], ext_modules=[
    Extension("flashy_2_cuda", ["csrc/api.c"], include_dirs=["csrc/cutlass/include"], extra_compile_args=flags)])
"""


def flashy(tmp_path: Path) -> tuple[Repository, str, Repository, str]:
    cutlass = Repository(tmp_path / "cutlass")
    inner = cutlass.commit({"include/cute.h": "#define CUTE 1\n"})
    outer = Repository(tmp_path / "flash")
    api = '#include "cute.h"\n#ifdef SM80\n#error "compiled for sm_80"\n#endif\n' + CORE.replace("NAME", "flashy_2_cuda")
    outer.commit({"setup.py": FLASH, "pyproject.toml": PYPROJECT, "csrc/api.c": api, "flashy/__init__.py": ""})
    outer.git("submodule", "add", "--quiet", cutlass.url, "csrc/cutlass")
    outer.git("commit", "--quiet", "--message", "a submodule")
    return outer, outer.git("rev-parse", "HEAD"), cutlass, inner


SUBSTITUTION = {"path": "setup.py", "find": 'flags.append("-DSM80")\n', "replace": ""}


def test_a_submodule_by_commit_and_an_architecture_taken_out_by_a_checked_substitution(farm: Farm, tmp_path: Path) -> None:
    outer, commit, _, inner = flashy(tmp_path)
    source = {"submodules": {"csrc/cutlass": {"url": f"{UPSTREAM}cutlass", "commit": inner, "license": "BSD-3-Clause"}}}
    tables = {"source": source, "version": "2.6.1.post2", "smoke": {"imports": ["flashy", "flashy_2_cuda"]}}
    git_recipe(farm, "flashy", outer, commit, substitutions=[SUBSTITUTION], **tables)
    done = farm.run("build", "flashy", "--target", NATIVE, **mirrors(tmp_path))
    assert done.code == 0, done.said
    git_recipe(farm, "flashy", outer, commit, substitutions=[SUBSTITUTION | {"count": 2}], **tables)
    done = farm.run("build", "flashy", "--target", NATIVE, **mirrors(tmp_path))
    assert done.code == 13, done.said
    assert "occurs 1 times, not 2" in done.said
    git_recipe(farm, "flashy", outer, commit, **tables)
    assert "compiled for sm_80" in farm.run("build", "flashy", "--target", NATIVE, **mirrors(tmp_path)).said


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
    """The repositories and the recipe of a project of aphrodite-engine's shape."""
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


def test_fetch_content_abi3_a_stub_driver_metadata_of_our_own_and_the_source_beside_the_wheel(
    farm: Farm, tmp_path: Path
) -> None:
    engine(farm, tmp_path)
    variables = with_driver(farm, tmp_path, "aarch64")
    done = farm.run("build", "engine", "--target", "aarch64", "--stack", "own", **variables)
    assert done.code == 0, done.said
    with zipfile.ZipFile(done.out.strip()) as opened:
        metadata = opened.read("engine-0.6.4.post1.dist-info/METADATA").decode()
    assert sorted(line for line in metadata.splitlines() if line.startswith("Requires-Dist")) == [
        "Requires-Dist: flashy==2.6.1.post2",
        "Requires-Dist: torch==2.4.0",
        "Requires-Dist: triton==3.2.0+git755d4164",
    ]
    source = Path(done.out.strip()).with_name("engine-0.6.4.post1.tar.gz")
    with tarfile.open(source) as tar:
        inside = tar.getnames()
    assert {
        "engine-0.6.4.post1/PKG-INFO",
        "engine-0.6.4.post1/core.c",
        "engine-0.6.4.post1/.deps/cutlass/include/cute.h",
    } <= set(inside)
    assert not any(".git/" in name for name in inside)


def test_the_digests_that_are_not_known_are_exactly_these(unread: Path) -> None:
    """With the digests that were filled in since put back: in these nine places, and in no other."""
    found: dict[str, list[str]] = {}
    for name in recipe.names(unread / "recipes"):
        for gap in gaps.of_recipe(recipe.load(unread / "recipes", name)):
            found.setdefault(str(gap.file.relative_to(unread)), []).append(gap.url)
    for name in stack.names(unread / "stacks"):
        loaded = stack.load(unread / "stacks", name)
        images = [(gap, loaded.data.container[Arch(gap.table[-1])].name) for gap in gaps.of_images(loaded)]
        for gap, address in [*((gap, gap.url) for gap in gaps.of_stack(loaded)), *images]:
            found.setdefault(str(gap.file.relative_to(unread)), []).append(address)
    assert found == GAPS
    assert sum(map(len, found.values())) == 3


WAITS = """
#include <Python.h>
#include <condition_variable>
#include <cstdlib>
static std::mutex mutex;
static std::condition_variable ready;
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "waits", 0, -1, 0};
PyMODINIT_FUNC PyInit_waits(void) {
    std::unique_lock<std::mutex> held(mutex);
    if (std::getenv("NEVER_SET")) ready.wait(held);
    return PyModule_Create(&module);
}
"""
WAITS_SETUP = """
from setuptools import Extension, setup
setup(name="waits", version="1.0", py_modules=[], ext_modules=[Extension("waits", ["waits.cpp"], language="c++")])
"""


def test_what_waits_on_a_condition_variable_needs_a_newer_level_and_that_is_said_before_the_compile(farm: Farm) -> None:
    """As LLVM's thread pool in triton: by g++ 12 it needs GLIBCXX_3.4.30, so stack cu124 allows glibc 2.35."""
    farm.recipe("waits", {"pyproject.toml": PYPROJECT, "setup.py": WAITS_SETUP, "waits.cpp": WAITS})
    place = farm.settings.project / "stacks/bare/stack.toml"
    assert '"2_34"' in place.read_text()
    older = farm.run("build", "waits", "--target", NATIVE)
    assert older.code == 30, older.said
    assert "platform-tag (requires manylinux_2_35" in older.said
    assert "GLIBCXX_3.4.30" in older.said.partition("platform-tag (")[2]
    warned, compiled, _ = older.said.partition(" compile ")
    assert compiled
    assert "waits.cpp uses std::condition_variable: objects of g++ 12 that wait on one require GLIBCXX_3.4.30" in warned
    place.write_text(place.read_text().replace('"2_34"', '"2_35"'))
    newer = farm.run("build", "waits", "--target", NATIVE)
    assert newer.code == 0, newer.said
    assert "uses std::condition_variable" not in newer.said
    assert newer.out.strip().endswith(f"-manylinux_2_35_{NATIVE}.whl")
    assert stack.load(REPOSITORY / "stacks", "cu124").data.glibc[Arch.AARCH64] == "2_35"


@pytest.mark.parametrize(
    ("name", "waits_for"),
    [
        ("triton", GAPS["recipes/triton/recipe.toml"]),
        ("flash_attn", ["https://download.pytorch.org/whl/cu124"]),
        ("aphrodite", ["https://download.pytorch.org/whl/cu124"]),
    ],
)
def test_a_recipe_waits_for_the_digests_of_what_it_uses_alone(name: str, waits_for: list[str], unread: Path) -> None:
    loaded, base = recipe.load(unread / "recipes", name), stack.load(unread / "stacks", "cu124")
    planned = choice.make_plan(loaded, base, host_arch(), Arch.AARCH64)
    assert [gap.url for gap in planned.gaps] == waits_for
    assert planned.toolchain.installed(planned).keys() >= {"pybind11", "nvidia-cuda-runtime-cu12"}
    assert ("torch" in planned.toolchain.installed(planned)) == (name != "triton")
    contained = replace(planned, toolchain=ContainerToolchain(engine="podman", cibuildwheel="4"))
    assert [gap.url for gap in contained.gaps][:-1] == waits_for
    assert contained.gaps[-1].what.startswith("image docker.io/pytorch/")


def test_a_gap_is_planned_refused_filled_in_by_a_lock_and_then_built(farm: Farm, tmp_path: Path) -> None:
    trinity(farm, tmp_path)
    place = farm.settings.project / "recipes/trinity/recipe.toml"
    known = sha256((tmp_path / "tool.tar.gz").read_bytes())
    gap = f'[[files]]\n# why it is here\nurl = "{URL}"\nsha256_unknown = "not reached"  # yet\n'
    gap += 'path = "seed/.triton/nvidia"\nmembers = { "bin/ptxas" = "ptxas/bin/ptxas" }\nlicense = "MIT"\n\n[[files]]\n'
    gap += f'text = "{URL}"\npath = "seed/.triton/llvm/llvm-1/version.txt"\n'
    lines = [line for line in place.read_text().splitlines() if not line.startswith("files =")]
    place.write_text("\n".join(lines) + "\n" + gap)
    planned = farm.run("plan", "trinity")
    assert planned.code == 0, planned.said
    assert f"no digest seed/.triton/nvidia {URL}: not reached" in planned.said
    refused = farm.run("build", "trinity", "--target", NATIVE)
    assert refused.code == 3
    assert "builder lock trinity" in refused.said
    assert f"{URL}" in refused.said
    assert "GRACEFARM_MIRRORS='https://blobs.example/=REPLACEMENT'" in refused.said
    changed = farm.run("build", "--changed", "--target", NATIVE)
    assert changed.code == 0, changed.said
    assert "skipped: trinity on stack bare cannot be built" in changed.said
    unreachable = farm.run("lock", "trinity")
    assert unreachable.code == 10, unreachable.said
    assert "GRACEFARM_MIRRORS='https://blobs.example/=REPLACEMENT'" in unreachable.said
    assert farm.run("lock", "trinity", **mirrors(tmp_path)).code == 0
    assert f'# why it is here\nurl = "{URL}"\nsha256 = "{known}"  # yet\npath' in place.read_text()
    done = farm.run("build", "trinity", "--target", NATIVE, **mirrors(tmp_path))
    assert done.code == 0, done.said


@pytest.mark.parametrize("name", ["flash_attn", "aphrodite", "triton"])
def test_a_pinned_recipe_is_refused_with_its_address_and_the_setting_for_a_mirror(name: str, unread: Path) -> None:
    before = os.times()
    done = projects.run_builder(["build", name], {"GRACEFARM_PROJECT": str(unread)})
    after = os.times()
    assert done.code == 3, done.said
    # At once: nothing is fetched or assembled before.
    assert after.children_user + after.children_system - before.children_user - before.children_system < 10
    first = {"triton": "https://oaitriton.blob.core.windows.net/"}.get(name, "https://download.pytorch.org/")
    assert first in done.said
    assert f"builder lock {name}" in done.said
    assert f"GRACEFARM_MIRRORS='{first}=REPLACEMENT'" in done.said
    if name == "triton":
        shown = (REPOSITORY / "docs/howto/pinned.md").read_text()
        for line in ("error: ", "remedy: "):
            assert next(message for message in done.err.splitlines() if message.startswith(line)) in shown, (
                "the page shows what is said"
            )


def test_a_gap_that_cannot_be_filled_stops_no_other_and_an_image_is_read_when_asked_for(unread: Path, tmp_path: Path) -> None:
    """One of three is there, two hosts are not; a stack's torch and image are read when they are asked for."""
    (tmp_path / "index/torch").mkdir(parents=True)
    torch = "torch-2.4.0-cp311-cp311-linux_aarch64.whl"
    (tmp_path / "index/torch/index.html").write_text(f'<a href="{torch}#sha256={"ab" * 32}">{torch}</a>')
    (tmp_path / "there").mkdir()
    (tmp_path / "there/more.zip").write_bytes(b"more")
    place = unread / "recipes/triton/recipe.toml"
    more = "".join(
        f'[[files]]\nurl = "https://{host}/more.zip"\nsha256_unknown = "not reached"\npath = "{host}"\n\n'
        for host in ("there.example", "gone.example")
    )
    place.write_text(place.read_text().replace("[build]\n", f"{more}[build]\n", 1))
    places = {"https://there.example/": "there/", "https://download.pytorch.org/whl/cu124": "index", "https://": "gone/"}
    environment = {
        "GRACEFARM_PROJECT": str(unread),
        "GRACEFARM_HOME": str(tmp_path / "home"),
        "GRACEFARM_MIRRORS": " ".join(f"{url}={tmp_path.as_uri()}/{folder}" for url, folder in places.items()),
    }
    done = projects.run_builder(["lock", "triton"], environment)
    assert done.code == 50, done.said
    assert "2 of 3 digests could not be fetched; see the errors above" in done.said
    assert "download.pytorch.org" not in done.said
    assert "registry-1.docker.io" not in done.said
    left = gaps.of_recipe(recipe.load(unread / "recipes", "triton"))
    assert [gap.url for gap in left] == [*GAPS["recipes/triton/recipe.toml"], "https://gone.example/more.zip"]
    assert f'sha256 = "{sha256(b"more")}"' in place.read_text()
    assert len(gaps.of_stack(stack.load(unread / "stacks", "cu124"))) == 1
    again = projects.run_builder(["lock", "cu124", "--digests"], environment)
    assert (again.code, "left for --toolchain container: image" in again.said) == (0, True), again.said
    loaded = stack.load(unread / "stacks", "cu124")
    assert gaps.of_stack(loaded) == []
    assert len(gaps.of_images(loaded)) == 1
    asked = projects.run_builder(["lock", "cu124", "--digests", "--toolchain", "container"], environment)
    assert asked.code == 10, asked.said
    assert "GRACEFARM_MIRRORS='https://registry-1.docker.io/=REPLACEMENT'" in asked.said


def test_what_a_stack_of_headers_builds_is_not_published(farm: Farm) -> None:
    farm.recipe("tiny", projects.backend("return wheel(wheel_directory)"), stack="cu124-headers")
    done = farm.run("build", "tiny", "--publish", "http://127.0.0.1:9/legacy/", TWINE_USERNAME="a", TWINE_PASSWORD="b")
    assert done.code == 40, done.said
    assert "has only headers" in done.said
    done = farm.run("run", "tiny")
    assert (done.code, "has only headers" in done.said) == (40, True), done.said


def test_cuda_12_4_from_debians_packages_compiles_for_aarch64(farm: Farm) -> None:
    build = {"cuda": True, "memory_per_job": "1GiB"}
    farm.recipe("tiny_cuda", projects.tree("tiny_cuda"), name="tiny-cuda", stack="cu124-headers", build=build)
    done = farm.run("build", "tiny_cuda")
    assert done.code == 0, done.said
    assert "cubins for exactly sm_90, and no PTX" in done.said
    assert "smoke not run: stack cu124-headers has only headers" in done.said
    # torch 2.4.0's CPU wheel for aarch64 says so; the record keeps it, for the CUDA wheel may say another thing.
    assert json.loads(farm.run("show", "tiny_cuda", "--json").out)["torch_cxx11_abi"] is False


def own_stack(farm: Farm, target: str) -> Path:
    """The stack.toml of a stack `own`, whose environment has own-thing of an index apart, its digest unknown."""
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
    """Write stack `own`, whose environment has a cuda.h: its declarations are the driver's functions. The mirrors for it."""
    own_stack(farm, target)
    own_wheel(folder / "index", **{"nvidia/cu13/include/cuda.h": "CUresult cuPointerGetAttribute(void);\n"})
    variables = mirrors(folder)
    variables["GRACEFARM_MIRRORS"] += f" https://torch.example/whl/cu124={(folder / 'index').as_uri()}"
    locked = farm.run("lock", "own", "--digests", **variables)
    assert locked.code == 0, locked.said
    return variables


def own_wheel(folder: Path, **files: str) -> bytes:
    """A wheel on a simple index in a folder, as torch has one for each CUDA release; the Python index knows nothing of it."""
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


def test_a_wheel_of_an_index_of_its_own_is_a_gap_then_locked_then_installed(farm: Farm, tmp_path: Path) -> None:
    data = own_wheel(tmp_path / "index")
    place = own_stack(farm, NATIVE)
    farm.recipe(
        "tiny", projects.backend("import own_thing\nassert own_thing.answer == 42\nreturn wheel(wheel_directory)"), stack="own"
    )
    refused = farm.run("build", "tiny", "--target", NATIVE)
    assert refused.code == 3, refused.said
    assert "GRACEFARM_MIRRORS='https://torch.example/=REPLACEMENT'" in refused.said
    unreachable = farm.run("lock", "own", "--digests")
    assert unreachable.code == 10, unreachable.said
    assert "GRACEFARM_MIRRORS='https://torch.example/=REPLACEMENT'" in unreachable.said
    mirror = {"GRACEFARM_MIRRORS": f"https://torch.example/whl/cu124={(tmp_path / 'index').as_uri()}"}
    locked = farm.run("lock", "own", "--digests", **mirror)
    assert locked.code == 0, locked.said
    assert f'sha256 = "{sha256(data)}"' in place.read_text()
    done = farm.run("build", "tiny", "--target", NATIVE, **mirror)
    assert done.code == 0, done.said
    (tmp_path / "index/own-thing/own_thing-1.0-py3-none-any.whl").write_bytes(data + b"changed")
    remove_tree(farm.settings.home / "builds")
    place.write_text(place.read_text().replace(sha256(data), sha256(data + b"another")))
    changed = farm.run("build", "tiny", "--target", NATIVE, **mirror)
    assert changed.code == 11, changed.said


def test_a_source_archive_is_published_before_its_wheel(farm: Farm) -> None:
    farm.recipe("tiny", projects.backend("return wheel(wheel_directory)"), wheel={"source_archive": True})
    with run.local_index(farm.settings) as (url, token):
        credentials = {"TWINE_USERNAME": "__token__", "TWINE_PASSWORD": token}
        done = farm.run("build", "tiny", "--target", NATIVE, "--publish", f"{url}/legacy/", **credentials)
        assert done.code == 0, done.said
        page = httpx.get(f"{url}/simple/tiny/", headers={"Accept": "application/vnd.pypi.simple.v1+json"}).json()
        source = next(file for file in page["files"] if file["filename"].endswith(".tar.gz"))
        address = httpx.URL(f"{url}/simple/tiny/").join(source["url"])
        archived = httpx.get(address).content
    assert sorted(file["filename"] for file in page["files"]) == ["tiny-1.0-py3-none-any.whl", "tiny-1.0.tar.gz"]
    assert done.said.index("tiny-1.0.tar.gz to") < done.said.index("tiny-1.0-py3-none-any.whl to")
    with tarfile.open(fileobj=io.BytesIO(archived)) as tar:
        assert {"tiny-1.0/backend.py", "tiny-1.0/PKG-INFO"} <= set(tar.getnames())
    shown = json.loads(farm.run("show", "tiny", "--json").out)
    assert shown["source"]["sha256"] == sha256(archived)


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


def test_torchs_own_cmake_files_find_cuda_12_4_for_the_target(farm: Farm) -> None:
    """What aphrodite's CMake does first: torch's cuda.cmake (FindCUDA), CUDA as a language, abi3, the driver to link with."""
    lines = (
        "for command in (['cmake', '-S', '.', '-B', 'b'], ['cmake', '--build', 'b']):",
        "    subprocess.run(command, check=True)",
        "content = open('b/_C.abi3.so', 'rb').read()",
        "return wheel(wheel_directory, tag='cp38-abi3-linux_aarch64', files={'tiny/_C.abi3.so': content})",
    )
    body = "\n".join(lines)
    files = projects.backend(body) | {"CMakeLists.txt": TORCH_CMAKE, "core.cu": CORE_CUDA}
    farm.recipe("tiny", files, stack="cu124-headers", build={"cuda": True, "memory_per_job": "1GiB"})
    done = farm.run("build", "tiny")
    assert done.code == 0, done.said + farm.run("log", "tiny").out
    assert "cubins for exactly sm_90, and no PTX" in done.said
    with zipfile.ZipFile(done.out.strip()) as opened:
        library = opened.read("tiny/_C.abi3.so")
    assert all(name in library for name in (b"libcudart.so.12", b"libcublas.so.12", b"libcuda.so.1"))


def test_the_pages_lines_serve_an_index_that_takes_the_set_with_the_token_that_they_make(tmp_path: Path) -> None:
    """docs/howto/pinned.md as it is written, in a separate home: host, token, serve; then the first step of a stage."""
    page = (REPOSITORY / "docs/howto/pinned.md").read_text().splitlines()
    lines = [line.strip() for line in page if line.startswith("    .venv/bin/python -m index ")]
    host, token, serve = (re.sub(r"^\.venv/bin/python", sys.executable, line) for line in lines)
    environment = projects.environment({"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")})
    environment.pop("GRACEFARM_HOME", None)
    ask = {"cwd": REPOSITORY, "env": environment, "capture_output": True, "text": True, "timeout": 120, "check": True}
    subprocess.run(["bash", "-euc", host], **ask)  # type: ignore[call-overload]
    secret = subprocess.run(["bash", "-euc", token], **ask).stdout.split()[-1]  # type: ignore[call-overload]
    port = tmp_path / "port"
    line = serve.partition(" &")[0].replace("--port 8080", f"--port 0 --port-file {port}")
    assert line != serve
    server = subprocess.Popen(["bash", "-euc", f"exec {line}"], cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL)
    try:
        for _ in range(600):
            if port.exists():
                break
            assert server.poll() is None
            time.sleep(0.1)
        url = f"http://127.0.0.1:{port.read_text().strip()}/stage/gh200-cu124"
        expect = {"expect": ["triton==3.2.0+git755d4164 cp311 aarch64"]}
        assert httpx.put(url, json=expect, auth=("__token__", "gf_wrong"), timeout=60).status_code in (401, 403)
        answer = httpx.put(url, json=expect, auth=("__token__", secret), timeout=60)
        assert answer.is_success, answer.text
        assert answer.json()["missing"] == ["triton==3.2.0+git755d4164 cp311 aarch64"]
    finally:
        server.terminate()
        server.wait(30)
