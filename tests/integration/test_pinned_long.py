"""CUDA 12.4 and the pinned kernels for real: what takes minutes."""

from __future__ import annotations

import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from builder import build, debian, plan, recipe, sandbox, stack
from builder.fetch import Download, download
from builder.sandbox import Mount
from builder.stack import Arch, host_arch
from gracefarm.console import Console
from tests import projects
from tests.conftest import REPOSITORY, Farm

pytestmark = pytest.mark.slow


@pytest.mark.timeout(3600)
def test_the_pinned_kernels_of_flash_attn_compile_into_objects(farm: Farm) -> None:
    shutil.copytree(REPOSITORY / "tests/recipes/flash_attn_objects", farm.settings.project / "recipes/flash_attn_objects")
    done = projects.run_builder(["build", "flash_attn_objects", "--jobs", "1"], farm.environment, timeout=3600)
    assert done.code == 0, done.said
    assert "cubins for exactly sm_90, and no PTX" in done.said
    wheel = Path(done.out.strip())
    with zipfile.ZipFile(wheel) as opened:
        needed = opened.read(next(name for name in opened.namelist() if name.endswith(".so")))
    # The stand-ins define nothing, so the linker drops them; what torch's CUDA half must define stays undefined.
    for name in (b"libcudart.so.12", b"libtorch_python.so", b"_ZN3c104cuda"):
        assert name in needed
    assert b"libtorch_cuda.so" not in needed


def headers_of_trixie(farm: Farm, into: Path) -> None:
    """glibc 2.41's headers for aarch64."""
    with debian.solver("trixie", Arch.AARCH64, [], farm.settings) as apt:
        found = apt.alone(["libc6-dev:arm64", "linux-libc-dev"])
        url = apt.url
    wanted = [Download(url=f"{url}/{one.path}", sha256=one.sha256, what=one.title) for one in found]
    for place in download(wanted, farm.settings).values():
        subprocess.run(["dpkg-deb", "--extract", place, into], check=True)


def test_trap_6_cuda_12_4_cannot_compile_against_glibc_2_41(farm: Farm, tmp_path: Path) -> None:
    farm.recipe("tiny", projects.backend("pass"), stack="cu124-headers", build={"cuda": True})
    loaded = recipe.load(farm.settings.project / "recipes", "tiny")
    made = plan.make(loaded, stack.load(farm.settings.project / "stacks", "cu124-headers"), host_arch(), Arch.AARCH64)
    ground = build.lay_ground(made, farm.settings, Console())
    new = tmp_path / "trixie"
    headers_of_trixie(farm, new)
    (tmp_path / "work/tmp").mkdir(parents=True)
    (tmp_path / "work/unit.cu").write_text("#include <cmath>\n__global__ void k(float *x) { *x = sinf(*x); }\n")
    box = build.build_sandbox(made, ground, farm.settings, tmp_path / "work", count=1, epoch=1, memory=4 << 30)
    log = tmp_path / "log.txt"
    command = ["/cuda/bin/nvcc", "-c", "unit.cu", "-o", "unit.o"]
    assert sandbox.run(box, command, log=log).returncode == 0, log.read_text()
    newer = sandbox.Sandbox(
        root=box.root,
        mounts=(*box.mounts, Mount(source=new / "usr/include", target="/run/include")),
        environment=box.environment,
        workdir=box.workdir,
        memory=box.memory,
    )
    places = ["-isystem", "/run/include/aarch64-linux-gnu", "-isystem", "/run/include"]
    log.unlink()
    assert sandbox.run(newer, [*command, *places], log=log).returncode != 0
    assert "__Float32x4_t" in log.read_text() or "__SVFloat32_t" in log.read_text()


@pytest.mark.timeout(1800)
def test_the_run_time_environment_of_the_three_installs_by_hash_and_imports(farm: Farm) -> None:
    """All of cu124's lock but torch, whose CPU wheel stands in: the engine's requirements fit together and load on aarch64."""
    stacks = farm.settings.project / "stacks"
    place = stacks / "cu124" / "stack.toml"
    text = place.read_text()
    start, end = text.index("[[environment.wheels]]"), text.index("[toolchain]")
    gate = '\ncuda = "12.4"\n\n[environment]'
    assert gate in text
    place.write_text((text[:start] + text[end:]).replace(gate, "\n\n[environment]"))
    (line,) = [
        one for one in (stacks / "cu124-headers/requirements.lock").read_text().splitlines() if one.startswith("torch==")
    ]
    with (stacks / "cu124/requirements.lock").open("a") as lock:
        lock.write(f"{line}\n")
    modules = ["torch", "transformers", "torchvision", "fastapi", "uvicorn", "tokenizers", "sentencepiece", "gguf", "ray"]
    modules += ["lmformatenforcer", "mistral_common", "librosa", "msgspec", "numba", "openai", "pandas", "prometheus_client"]
    modules += ["ray.dashboard.optional_deps"]  # which `ray start --include-dashboard true` asks for
    farm.recipe(
        "tiny",
        projects.backend("return wheel(wheel_directory)"),
        stack="cu124",
        smoke={"imports": ["tiny", *modules]},
    )
    done = farm.run("build", "tiny")
    assert done.code == 0, done.said
