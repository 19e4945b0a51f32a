"""Projects of the shapes of triton, aphrodite_flash_attn and aphrodite-engine, built from git mirrors by the real pipeline."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import httpx

from builder.flow import run
from builder.planning import stack
from builder.planning.stack import Arch
from tests import projects
from tests.conftest import REPOSITORY, Farm
from tests.integration.fetch_kit import Repository, sha256
from tests.integration.pinned_kit import (
    CORE,
    CORE_CUDA,
    NATIVE,
    PYPROJECT,
    TORCH_CMAKE,
    UPSTREAM,
    engine,
    git_recipe,
    mirrors,
    trinity,
    with_driver,
)


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
    assert "occurs 1 times, but the recipe states 2" in done.said
    git_recipe(farm, "flashy", outer, commit, **tables)
    assert "compiled for sm_80" in farm.run("build", "flashy", "--target", NATIVE, **mirrors(tmp_path)).said


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
    assert "platform-tag (the wheel requires manylinux_2_35" in older.said
    assert "GLIBCXX_3.4.30" in older.said.partition("platform-tag (")[2]
    warned, compiled, _ = older.said.partition(" compile ")
    assert compiled
    assert "waits.cpp uses std::condition_variable. With g++ 12, code that waits on a condition variable" in warned
    place.write_text(place.read_text().replace('"2_34"', '"2_35"'))
    newer = farm.run("build", "waits", "--target", NATIVE)
    assert newer.code == 0, newer.said
    assert "uses std::condition_variable" not in newer.said
    assert newer.out.strip().endswith(f"-manylinux_2_35_{NATIVE}.whl")
    assert stack.load(REPOSITORY / "stacks", "cu124").data.glibc[Arch.AARCH64] == "2_35"


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


def test_a_source_archive_is_published_before_its_wheel(farm: Farm) -> None:
    deep = f"{'folder/' * 15}{'name' * 20}.txt"  # longer than a tar header can hold
    files = projects.backend("return wheel(wheel_directory)") | {deep: "text"}
    farm.recipe("tiny", files, wheel={"source_archive": True})
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
        assert {"tiny-1.0/backend.py", "tiny-1.0/PKG-INFO", f"tiny-1.0/{deep}"} <= set(tar.getnames())
        assert {name.split("/")[0] for name in tar.getnames()} == {"tiny-1.0"}
    shown = json.loads(farm.run("show", "tiny", "--json").out)
    assert shown["source"]["sha256"] == sha256(archived)


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
