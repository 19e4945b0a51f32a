"""CUDA 12.4 and the pinned kernels for real: what takes minutes."""

from __future__ import annotations

import re
import shutil
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from builder import debian, machine, sandbox, stack, toolkit
from builder.fetch import Download, download
from builder.sandbox import Mount
from builder.stack import Arch, host_arch
from gracefarm.errors import HostError
from tests import projects
from tests.conftest import REPOSITORY, Farm
from tests.integration.test_pinned import place

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


def headers_of_trixie(farm: Farm, into: Path) -> str:
    """glibc's headers of Debian 13 for aarch64, by its signed package lists; the package's version."""
    with debian.solver("trixie", Arch.AARCH64, [], farm.settings) as apt:
        found = apt.alone(["libc6-dev:arm64", "linux-libc-dev"])
        url = apt.url
    wanted = [Download(url=f"{url}/{one.path}", sha256=one.sha256, what=one.title) for one in found]
    for deb in download(wanted, farm.settings).values():
        subprocess.run(["dpkg-deb", "--extract", deb, into], check=True)
    return next(one.version for one in found if one.name == "libc6-dev")


def test_trap_6_cuda_12_4_cannot_compile_against_glibc_2_41(farm: Farm, tmp_path: Path) -> None:
    """One unit by nvcc 12.4.131 itself: with the stack's own headers, then with Debian 13's, which gcc and CUDA 13.0 read."""
    own, headers = stack.load(REPOSITORY / "stacks", "cu124"), stack.load(REPOSITORY / "tests/stacks", "cu124-headers")
    assert toolkit.digest(headers, host_arch()) == toolkit.digest(own, host_arch())
    version = headers_of_trixie(farm, tmp_path / "trixie")
    assert version.startswith("2.41")
    newer = Mount(source=tmp_path / "trixie/usr/include", target="/run/include")
    log = tmp_path / "log.txt"

    def compiles(name: str, *command: str, against: Mount | None = None) -> bool:
        log.unlink(missing_ok=True)
        places = ["-isystem", f"{newer.target}/aarch64-linux-gnu", "-isystem", newer.target] if against else []
        box = replace(boxes[name], mounts=(*boxes[name].mounts, *([against] if against else [])))
        return sandbox.run(box, [*command, *places], log=log).returncode == 0

    boxes = {name: place(farm, name, tmp_path / name) for name in ("cu124-headers", "cu130")}
    for name in boxes:
        (tmp_path / name / "unit.cu").write_text("#include <cmath>\n__global__ void k(float *x) { *x = sinf(*x); }\n")
        (tmp_path / name / "unit.cpp").write_text("#include <cmath>\nfloat f(float x) { return std::sin(x); }\n")
    nvcc, gcc = ("/cuda/bin/nvcc", "-c", "unit.cu", "-o", "unit.o"), ("g++", "-c", "unit.cpp", "-o", "unit.o")
    assert compiles("cu124-headers", *nvcc), log.read_text()
    assert not compiles("cu124-headers", *nvcc, against=newer)
    said = log.read_text()
    errors = {"math-vector": ("__Float32x4_t", "__SVFloat32_t"), "mathcalls": ("cospi", "sinpi")}
    for header, identifiers in errors.items():
        for identifier in identifiers:
            assert re.search(rf"/run/include/\S*bits/{header}\.h.*: error: .*\"{identifier}\"", said), said
    assert compiles("cu124-headers", *gcc, against=newer), log.read_text()
    assert compiles("cu130", *nvcc, against=newer), log.read_text()
    # What the build does before it compiles anything, with a root and on a machine that have these headers.
    with pytest.raises(HostError, match=r"cannot read the headers of glibc 2\.41"):
        machine.check_headers(Arch.AARCH64, "12.4", version.partition("-")[0])
    machine.check_headers(Arch.AARCH64, "13.0", version.partition("-")[0])
    lock = farm.settings.project / "stacks/cu124-headers/root.lock"
    lock.write_text(re.sub(r'(name = "libc6-dev", .*version = ")[^"]+', rf"\g<1>{version}", lock.read_text()))
    refused = farm.run("build", "tiny", "--stack", "cu124-headers")
    assert (refused.code, "cannot read the headers of glibc 2.41" in refused.said) == (3, True), refused.said


@pytest.mark.timeout(1800)
def test_the_run_time_environment_of_the_three_installs_by_hash_and_imports(farm: Farm) -> None:
    """All of cu124's lock but torch, whose CPU wheel stands in: the engine's requirements fit together and load on aarch64."""
    stacks = farm.settings.project / "stacks"
    description = stacks / "cu124" / "stack.toml"
    text = description.read_text()
    start, end = text.index("[[environment.wheels]]"), text.index("[toolchain]")
    gate = '\ncuda = "12.4"\n\n[environment]'
    assert gate in text
    description.write_text((text[:start] + text[end:]).replace(gate, "\n\n[environment]"))
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
