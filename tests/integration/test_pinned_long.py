"""CUDA 12.4 and the pinned kernels for real: what takes minutes."""

from __future__ import annotations

import re
import shutil
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from builder.box import sandbox
from builder.box.sandbox import BindMount
from builder.fetch import Download, download
from builder.ground import debian
from builder.planning import packages, pins, recipe, stack
from builder.planning.stack import Arch, host_arch
from builder.proof.embed import require
from builder.sets import together
from builder.toolchains import host_tools
from gracefarm.errors import HostError
from tests import projects
from tests.conftest import REPOSITORY, Farm
from tests.integration.pinned_kit import place
from tests.integration.test_audit_real import APHRODITE, APHRODITE_SHA256, published
from tests.integration.test_build import record_of

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
    wanted = [Download(url=f"{url}/{package.path}", sha256=package.sha256, what=package.title) for package in found]
    for deb in download(wanted, farm.settings).values():
        subprocess.run(["dpkg-deb", "--extract", deb, into], check=True)
    return next(package.version for package in found if package.name == "libc6-dev")


def test_trap_6_cuda_12_4_cannot_compile_against_glibc_2_41(farm: Farm, tmp_path: Path) -> None:
    """One unit by nvcc 12.4.131 itself: with the stack's own headers, then with Debian 13's, which gcc and CUDA 13.0 read."""
    own, headers = stack.load(REPOSITORY / "stacks", "cu124"), stack.load(REPOSITORY / "tests/stacks", "cu124-headers")
    assert packages.toolkit_digest(headers, host_arch()) == packages.toolkit_digest(own, host_arch())
    version = headers_of_trixie(farm, tmp_path / "trixie")
    assert version.startswith("2.41")
    newer = BindMount(source=tmp_path / "trixie/usr/include", target="/run/include")
    log = tmp_path / "log.txt"

    def compiles(name: str, *command: str, against: BindMount | None = None) -> bool:
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
        host_tools.check_headers(Arch.AARCH64, "12.4", version.partition("-")[0])
    host_tools.check_headers(Arch.AARCH64, "13.0", version.partition("-")[0])
    lock = farm.settings.project / "stacks/cu124-headers/root.lock"
    lock.write_text(re.sub(r'(name = "libc6-dev", .*version = ")[^"]+', rf"\g<1>{version}", lock.read_text()))
    refused = farm.run("build", "tiny", "--stack", "cu124-headers")
    assert (refused.code, "cannot read the headers of glibc 2.41" in refused.said) == (3, True), refused.said


def with_cpu_torch(farm: Farm) -> None:
    """stacks/cu124 with torch's CPU wheel, of the same version, in place of the gap."""
    stacks = farm.settings.project / "stacks"
    description = stacks / "cu124" / "stack.toml"
    text = description.read_text()
    start, end = text.index("[[environment.wheels]]"), text.index("[toolchain]")
    gate = '\ncuda = "12.4"\n\n[environment]'
    assert gate in text
    description.write_text((text[:start] + text[end:]).replace(gate, "\n\n[environment]"))
    (line,) = [
        line for line in (stacks / "cu124-headers/requirements.lock").read_text().splitlines() if line.startswith("torch==")
    ]
    with (stacks / "cu124/requirements.lock").open("a") as lock:
        lock.write(f"{line}\n")


@pytest.mark.timeout(1800)
def test_the_run_time_environment_of_the_three_installs_by_hash_and_imports(farm: Farm) -> None:
    """cu124's lock, with the CPU wheel of torch: the engine's requirements fit together and load on aarch64."""
    with_cpu_torch(farm)
    modules = ["torch", "transformers", "torchvision", "fastapi", "uvicorn", "tokenizers", "sentencepiece", "gguf", "ray"]
    modules += ["lmformatenforcer", "mistral_common", "librosa", "msgspec", "numba", "openai", "pandas", "prometheus_client"]
    modules += ["ray.dashboard.optional_deps"]  # which `ray start --include-dashboard true` asks for
    farm.recipe(
        "tiny",
        projects.backend("return wheel(wheel_directory)"),
        stack="cu124",
        wheel={"requires": {"torch": "torch==2.4.0"}},
        smoke={"imports": ["tiny", *modules]},
    )
    done = farm.run("build", "tiny")
    assert done.code == 0, done.said


TRITON = ("triton", "triton-3.2.0-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl")
TRITON_SHA256 = "8009a1fb093ee8546495e96731336a33fb8856a38e45bb4ab6affd6dbc3ba220"
LIBTRITON = """
from unittest.mock import MagicMock

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return MagicMock()
"""


def python_of_triton(farm: Farm) -> dict[str, bytes]:
    """Release 3.2.0's Python code, the nearest that was published; libtriton, which none has for aarch64, is a mock."""
    project, name = TRITON
    stored = download([published(project, name, TRITON_SHA256)], farm.settings)[TRITON_SHA256]
    with zipfile.ZipFile(stored) as opened:
        files = {f"tree/{name}": opened.read(name) for name in opened.namelist() if name.endswith(".py")}
    return files | {"tree/triton/_C/libtriton.py": LIBTRITON.encode()}


PACKED = """
files = {}
for folder, _, names in os.walk("tree"):
    for name in names:
        place = os.path.join(folder, name)
        files[os.path.relpath(place, "tree")] = open(place, "rb").read()
return wheel(wheel_directory, name="aphrodite_engine", version="0.6.4.post1", files=files)
"""
HELP = """
import subprocess
said = subprocess.run([sys.executable, "/env/bin/aphrodite", "run", "--help"], check=True, capture_output=True, text=True)
assert "--tensor-parallel-size" in said.stdout, said
"""


@pytest.mark.timeout(1800)
def test_the_engines_own_python_code_runs_in_the_environment_of_the_set(farm: Farm, tmp_path: Path) -> None:
    """PyPI's wheel of the pinned commit, for x86_64, without its extensions: requirements, import, options, command.

    With triton beside it, for then the engine imports outlines, and that a distribution which is gone from the index.
    """
    project, name = APHRODITE
    stored = download([published(project, name, APHRODITE_SHA256)], farm.settings)[APHRODITE_SHA256]
    data = recipe.load(REPOSITORY / "recipes", "aphrodite").data
    info = "aphrodite_engine-0.6.4.post1.dist-info"
    with zipfile.ZipFile(stored) as opened:
        kept = [name for name in opened.namelist() if name.startswith("aphrodite/") and not name.endswith((".so", "/"))]
        files = {f"tree/{name}": opened.read(name) for name in (*kept, f"{info}/entry_points.txt")}
        metadata = require(opened.read(f"{info}/METADATA").decode(), data.wheel.requires)
    assert data.source.kind == "git"
    assert data.source.commit in files["tree/aphrodite/commit_id.py"].decode()
    # What the recipe's wheel will require is in the set's lock, except the set's own wheels.
    asked = together.requirements(metadata.encode(), "3.11", Arch.AARCH64)
    locked = {wheel.name: wheel.version for wheel in pins.wheels(stack.load(REPOSITORY / "stacks", "cu124"), Arch.AARCH64)}
    ours = {str(requirement) for requirement in asked if canonicalize_name(requirement.name) not in locked}
    assert ours == set(data.wheel.requires.values())
    assert all(
        requirement.specifier.contains(locked[canonicalize_name(requirement.name)])
        for requirement in asked
        if str(requirement) not in ours
    )
    with_cpu_torch(farm)
    folder = farm.recipe(
        "engine",
        projects.backend(PACKED) | files | python_of_triton(farm),
        name="aphrodite-engine",
        version="0.6.4.post1",
        stack="cu124",
        wheel={"requires": {"torch": "torch==2.4.0"}},
        substitutions=[
            substitution.model_dump() | {"path": f"tree/{substitution.path}"} for substitution in data.substitutions
        ],
        smoke={"imports": ["triton", "aphrodite", "outlines.fsm.guide"]},
    )
    own = (REPOSITORY / "sets/gh200-cu124/smoke.py").read_text()
    _, found, table = own.partition("from aphrodite.engine.args_tools")
    assert found
    (folder / "smoke.py").write_text(f"import argparse, json, sys\n{found}{table}{HELP}")
    done = farm.run("build", "engine")
    assert done.code == 0, f"{done.said}\n{farm.run('log', 'engine').out[-3000:]}"
    assert '"--pipeline-parallel-size"' in record_of(farm, "engine")["smoke"]["script"]  # type: ignore[index]
