"""recipes/triton as it is written, to a wheel: its seed, its [wheel] table, its smoke.py and all gates.

What stands in: a project of triton's shape for its sources, empty folders for LLVM and json. The programs of CUDA 12.4 for
aarch64 are real, out of Debian's package (12.4.131) and NVIDIA's wheel (CUPTI 12.4.127); the recipe's are 12.4.99, of conda.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import tomlkit

from builder import build, debian, plan, recipe, stack, toolkit
from builder.fetch import Download, download
from builder.stack import Arch, host_arch
from gracefarm.console import Console
from tests import projects
from tests.conftest import REPOSITORY, Farm
from tests.integration.fetch_kit import Repository, sha256
from tests.integration.test_build import record_of
from tests.integration.test_pinned import CORE, PYPROJECT

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


def packed(files: dict[str, Path | None]) -> bytes:
    """An archive as conda's are before CUDA 12.5: files by their place in it, None for a header."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:bz2") as tar:
        for name, place in files.items():
            if place is None:
                tar.addfile(tarfile.TarInfo(name), io.BytesIO())
            else:
                tar.add(place.resolve(), name)
    return raw.getvalue()


TOOLS = ("ptxas", "cuobjdump", "nvdisasm")


def programs(farm: Farm, folder: Path) -> dict[str, bytes]:
    """Archives laid out as those that triton downloads, by the name of conda's package."""
    base = stack.load(farm.settings.project / "stacks", "cu124-headers")
    (deb,) = toolkit.packages(base, Arch.AARCH64)
    url = f"{debian.mirror('trixie', farm.settings)}/{deb.path}"
    place = download([Download(url=url, sha256=deb.sha256, what=deb.title)], farm.settings)[deb.sha256]
    subprocess.run(["dpkg-deb", "--extract", place, folder], check=True)
    found = {name: next(one for one in folder.rglob(f"bin/{name}") if one.is_file()) for name in TOOLS}
    farm.recipe("headers", projects.backend("pass"), stack=base.data.name)
    made = plan.make(recipe.load(farm.settings.project / "recipes", "headers"), base, host_arch(), Arch.AARCH64)
    ground = build.lay_ground(made, farm.settings, Console())
    cupti = ground.packages(made) / "nvidia/cuda_cupti"
    libraries = {f"lib/{one.name}": one for one in sorted((cupti / "lib").glob("*.so*"))}
    # Links there, which setup.py's copy follows.
    libraries |= {f"lib/{name}": cupti / "lib/libcupti.so.12" for name in ("libcupti.so", "libcupti.so.2024.1.0")}
    return {
        "cuda-nvcc": packed({"bin/ptxas": found["ptxas"], "include/crt/a.h": None}),
        "cuda-cuobjdump": packed({"bin/cuobjdump": found["cuobjdump"]}),
        "cuda-nvdisasm": packed({"bin/nvdisasm": found["nvdisasm"]}),
        "cuda-cudart-dev": packed({"include/cuda_runtime.h": None}),
        "cuda-cupti": packed({"include/cupti.h": None, **libraries}),
    }


@pytest.mark.slow
def test_triton_as_its_recipe_says_with_nvidias_own_programs_passes_every_gate(farm: Farm, tmp_path: Path) -> None:
    document = tomlkit.parse((REPOSITORY / "recipes/triton/recipe.toml").read_text())
    llvm, json = (next(one["url"] for one in document["files"] if word in one.get("url", "")) for word in ("llvm", "json"))
    content = programs(farm, tmp_path / "deb")
    content["llvm"] = packed({"llvm-86b69c31-ubuntu-arm64/include/a.h": None})
    with zipfile.ZipFile(raw := io.BytesIO(), "w") as opened:
        opened.writestr("include/nlohmann/json.hpp", "")
    content["json"] = raw.getvalue()
    for one in document["files"]:
        if "url" not in one:
            continue
        name = next(name for name in content if name in one["url"])
        place = tmp_path / "mirror" / str(one["url"]).removeprefix("https://")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content[name])
        one.pop("sha256_unknown", None)
        one["sha256"] = sha256(content[name])
    repository = Repository(tmp_path / "mirror/github.com/triton-lang/triton")
    modules = {f"python/{name}.c": CORE.replace("NAME", name) for name in ("libtriton", "libproton")}
    packages = {f"python/triton/{name}__init__.py": "" for name in ("", "language/")}
    setup = SETUP.replace("LLVM", llvm).replace("JSON", json)
    commit = repository.commit({"python/setup.py": setup, "python/pyproject.toml": PYPROJECT, **modules, **packages})
    document["source"].update({"commit": commit, "tree": repository.tree(commit)})
    document["version"] = f"3.2.0+git{commit[:8]}"
    document["build"]["binfmt"] = False  # no program of the target runs in this build
    folder = farm.settings.project / "recipes/triton"
    shutil.copytree(REPOSITORY / "recipes/triton", folder)
    (folder / "recipe.toml").write_text(tomlkit.dumps(document))
    mirrors = f"https://={(tmp_path / 'mirror').as_uri()}/"
    done = farm.run("build", "triton", "--stack", "cu130", GRACEFARM_MIRRORS=mirrors)
    assert done.code == 0, f"{done.said}\n{farm.run('log', 'triton').out[-3000:]}"
    found = record_of(farm, "triton")
    assert {one["gate"]: one["status"] for one in found["verdicts"]} == {  # type: ignore[attr-defined]
        **dict.fromkeys(("wheel", "elf-machine", "python-abi", "platform-tag", "grafted"), "passed"),
        **dict.fromkeys(("rpath", "alignment", "symbols"), "passed"),
        "cubins": "not applicable",
    }
    assert "ptxas" in found["smoke"]["script"]  # type: ignore[index]  # its version, or that no kernel starts it here
    with zipfile.ZipFile(done.out.strip()) as opened:
        held = {name.removeprefix("triton/backends/nvidia/") for name in opened.namelist()}
    assert {*(f"bin/{name}" for name in TOOLS), "lib/cupti/libcupti.so.2024.1.0", "lib/libdevice.10.bc"} <= held

    def without(drop: Callable[[dict[str, str]], bool]) -> str:
        changed = tomlkit.parse(tomlkit.dumps(document))
        kept = [one for one in changed["wheel"]["bundled"] if not drop(one)]
        assert len(kept) == len(changed["wheel"]["bundled"]) - 1
        changed["wheel"]["bundled"] = kept
        (folder / "recipe.toml").write_text(tomlkit.dumps(changed))
        again = farm.run("build", "triton", "--stack", "cu130", GRACEFARM_MIRRORS=mirrors)
        assert again.code == 30, again.said
        return again.said

    # Each line of the recipe's table is needed: judged again, without compiling.
    assert "lib/cupti/libcupti.so" in without(lambda one: one["path"].endswith("cupti/*"))
    assert "bin/nvdisasm" in without(lambda one: one["path"].endswith("nvdisasm"))
