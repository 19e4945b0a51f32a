"""The program choose.py: its detection of a machine, its choice of a wheel, and its command, which installs the wheel."""

from __future__ import annotations

import html
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from index_kit import Server, run_index, wheel
from packaging.tags import sys_tags
from packaging.utils import parse_wheel_filename

import index.web

PROGRAM = Path(index.web.__file__).with_name("data") / "choose.py"
ARCH = platform.machine()
OTHER_ARCH = "x86_64" if ARCH == "aarch64" else "aarch64"
HERE = f"cp3{sys.version_info[1]}"
NEXT = f"cp3{sys.version_info[1] + 1}"
NAME = "chooser_pkg"

NVIDIA_SMI = """#!/bin/sh
# Simulates a GPU, which is not available here: the part of nvidia-smi's output (driver {driver}) that is read.
case "$*" in
  *compute_cap*) {caps} ;;
  *) echo "| NVIDIA-SMI {driver}    Driver Version: {driver}    CUDA Version: {cuda}     |" ;;
esac
"""


@pytest.fixture(scope="module")
def program() -> ModuleType:
    spec = util.spec_from_file_location("choose", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def machine(program: ModuleType, **facts: object) -> Any:
    """A GH200 with torch for CUDA 13.0, except for these facts."""
    gh200 = {
        "minor": 11, "free_threaded": False, "implementation": "cp", "system": "Linux", "arch": "aarch64", "glibc": (2, 36),
        "driver": (13, 0), "gpus": [(9, 0)], "torch": "2.11.0+cu130", "torch_cuda": "13.0",
    }  # fmt: skip
    made = object.__new__(program.ThisMachine)
    vars(made).update({**gh200, **facts})
    return made


def offered(text: str, **facts: object) -> dict[str, object]:
    """A wheel as the index describes it."""
    tag = facts.pop("tag", "cp311-cp311-manylinux_2_34_aarch64")
    plain = {"rank": 0, "cuda": "", "torch": "", "sm": [], "pythons": None, "url": text, "version": "1.0"}
    return {**plain, "tags": [str(tag).split("-")], **facts}


WHEELS = [
    offered("cu124", cuda="12.4", torch="2.11", sm=["90"]),
    offered("cu130", cuda="13.0", torch="2.11", sm=["80", "90a"]),
    offered("cu130-plain90", cuda="13.0", torch="2.11", sm=["80", "90"], rank=1),
    offered("cu132", cuda="13.2", torch="2.12", sm=["90"]),
    offered("cu130-b200", cuda="13.0", torch="2.11", sm=["100f"]),
    offered("cu130-12", cuda="13.0", torch="2.11", sm=["120"], tag="cp312-cp312-manylinux_2_34_aarch64"),
    offered("cu130-13t", cuda="13.0", torch="2.11", sm=["90"], tag="cp313-cp313t-manylinux_2_34_aarch64"),
    offered("x86", cuda="13.0", torch="2.11", sm=["90"], tag="cp311-cp311-manylinux_2_34_x86_64"),
    offered("old", rank=2, tag="py3-none-any"),
]


@pytest.mark.parametrize(
    ("facts", "chosen"),
    [
        ({}, "cu130"),
        ({"torch": "2.12.0", "torch_cuda": "13.2"}, "cu132"),
        ({"torch": "2.11.0", "torch_cuda": "12.4"}, "cu124"),
        ({"torch": "2.11.0+cpu", "torch_cuda": ""}, "old"),
        ({"torch": "", "torch_cuda": ""}, "cu130"),
        ({"torch": "", "torch_cuda": "", "driver": (12, 8)}, "cu124"),
        ({"torch": "", "torch_cuda": "", "driver": (13, 2)}, "cu132"),
        ({"torch": "", "torch_cuda": "", "driver": (11, 8)}, "old"),
        ({"gpus": [(10, 0)]}, "cu130-b200"),
        ({"gpus": [(10, 3)]}, "cu130-b200"),
        ({"gpus": [(8, 6)]}, "cu130"),
        ({"gpus": [(8, 0), (9, 0)]}, "cu130"),
        ({"gpus": [(9, 0), (10, 0)]}, "old"),
        ({"minor": 12, "gpus": [(12, 1)]}, "cu130-12"),
        ({"minor": 13, "free_threaded": True}, "cu130-13t"),
        ({"minor": 13}, "old"),
        ({"arch": "x86_64"}, "x86"),
        ({"glibc": (2, 28)}, "old"),
        ({"glibc": ()}, "old"),
        ({"system": "Darwin", "arch": "arm64", "gpus": [], "driver": (), "torch": "", "torch_cuda": ""}, "old"),
        ({"gpus": [], "driver": ()}, "cu130"),
        ({"gpus": [], "driver": (), "torch": "", "torch_cuda": ""}, "cu132"),
    ],
    ids=str,
)
def test_the_right_wheel_of_each_machine(program: ModuleType, facts: dict[str, object], chosen: str) -> None:
    wheels = WHEELS if facts.get("gpus") != [(9, 0), (10, 0)] else [*WHEELS[:5], WHEELS[8]]
    right, reason = program.choose(wheels, machine(program, **facts))
    assert right is not None, reason
    assert right["url"] == chosen


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"minor": 9}, "no wheel matches this machine's Python and platform; available: cp311/cp311/manylinux_2_34_aarch64"),
        ({"gpus": [(7, 5)]}, "no wheel matches this machine's GPU; available: sm 100f; sm 80, 90; sm 80, 90a; sm 90"),
        ({"torch_cuda": "11.8"}, "no wheel matches this machine's CUDA; available: CUDA 12.4; CUDA 13.0; CUDA 13.2"),
        ({"torch": "2.9.1"}, "no wheel matches this machine's torch; available: torch 2.11; torch 2.12"),
    ],
    ids=str,
)
def test_why_there_is_none(program: ModuleType, facts: dict[str, object], reason: str) -> None:
    right, text = program.choose(WHEELS[:5], machine(program, **facts))
    assert right is None
    assert text == reason


def test_it_takes_the_files_that_pip_takes(program: ModuleType) -> None:
    """Compare with `packaging`, which pip uses, for every tag of this interpreter and for others."""
    mine = {str(tag) for tag in sys_tags()}
    this = program.ThisMachine()
    pythons = [f"{kind}3{minor}" for kind in ("cp", "py") for minor in ("", *range(8, 16))]
    abis = ["none", "abi3", "abi3t", *(f"cp3{minor}{flag}" for minor in range(8, 16) for flag in ("", "t"))]
    platforms = ["any", "win_amd64", f"macosx_11_0_{ARCH}"]
    platforms += [
        f"{head}_{arch}"
        for arch in (ARCH, OTHER_ARCH)
        for head in ("linux", "manylinux1", "manylinux2014", "manylinux_2_17", "manylinux_2_99", "musllinux_1_2")
    ]
    tags = [f"{python}-{abi}-{place}" for python in pythons for abi in abis for place in platforms]
    # Tags that no wheel has: an ABI on any platform; py3, or a Python without its number, with an ABI.
    tags = [tag for tag in tags if re.match(r"cp3\d+-none|cp3\d+-(abi3t?|cp).*_|py3\d*-none", tag)]
    assert len(tags) > 1000
    wrong = [tag for tag in tags if program.fits_python(offered("x", tag=tag), this) != (tag in mine)]
    assert wrong == []
    assert program.fits_python(offered("x", tag=next(iter(sorted(mine)))), this)


@pytest.fixture(scope="module")
def stocked(shared: Server, tmp_path_factory: pytest.TempPathFactory) -> Server:
    """Wheels for this Python and others, two CUDA and torch versions. An import tells which wheel is installed."""
    builds = [
        ("1.0", "13.0", "2.11", HERE, ARCH),
        ("1.0", "13.0", "2.12", HERE, ARCH),
        ("1.0", "12.8", "2.11", HERE, ARCH),
        ("1.0", "13.0", "2.11", HERE, OTHER_ARCH),
        ("1.0", "13.0", "2.11", NEXT, ARCH),
        ("0.9", "13.0", "2.11", HERE, ARCH),
    ]
    for version, cuda, torch, python, arch in builds:
        full = f"{version}+cu{cuda.replace('.', '')}.torch{torch}"
        own = {f"{NAME}/__init__.py": f'WHICH = "{full} {python} {arch}"\n'.encode()}
        assert shared.upload(*wheel(NAME, full, f"{python}-{python}-manylinux_2_17_{arch}", files=own)).status_code == 200
    return shared


@pytest.fixture
def gpu(tmp_path: Path) -> Path:
    """A folder for PATH with an nvidia-smi that reports one H100."""
    folder = tmp_path / "bin"
    folder.mkdir()
    smi = folder / "nvidia-smi"
    smi.write_text(NVIDIA_SMI.format(driver="580.82.07", cuda="13.0", caps="echo 9.0; echo 9.0"))
    smi.chmod(0o755)
    return folder


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """A separate Python with uv and without pip."""
    subprocess.run(["uv", "venv", "-q", "--python", sys.executable, tmp_path / "venv"], check=True, env=with_uv())
    return tmp_path / "venv"


def with_uv(*folders: Path) -> dict[str, str]:
    """An environment with uv on PATH, and these folders first."""
    places = [*map(str, folders), str(Path(sys.executable).parent), os.defpath]
    return {**os.environ, "PATH": os.pathsep.join(places), "UV_CACHE_DIR": os.environ.get("UV_CACHE_DIR", "/tmp/uv")}


def line_of(server: Server) -> str:
    """The command on the project's page."""
    text = server.client.get(f"/project/{NAME.replace('_', '-')}/").text
    found = re.search(r"<code>(python3 -c .*?)</code>", text)
    assert found
    return html.unescape(found[1])


def shell(line: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=environment, timeout=120, check=False)


def install_torch(environment: Path, version: str, cuda: str, folder: Path) -> None:
    """A distribution named torch. Only its version and version.py are read."""
    own = {"torch/__init__.py": b"raise RuntimeError('torch must not be imported')\n"}
    own["torch/version.py"] = (
        f"from typing import Optional\n__version__ = '{version}'\ncuda: Optional[str] = '{cuda}'\n".encode()
    )
    name, content = wheel("torch", version, files=own)
    (folder / name).write_bytes(content)
    command = ["uv", "pip", "install", "-q", "--offline", "--no-index", "--python", environment / "bin/python", folder / name]
    subprocess.run(command, check=True, env=with_uv())


@pytest.mark.parametrize(
    ("torch", "cuda", "which"),
    [
        ("2.11.0+cu130", "13.0", "1.0+cu130.torch2.11"),
        ("2.12.1", "13.0", "1.0+cu130.torch2.12"),
        ("2.11.0", "12.8", "1.0+cu128.torch2.11"),
    ],
)
def test_the_line_prints_a_command_that_installs_the_wheel_for_this_torch(
    stocked: Server, environment: Path, gpu: Path, tmp_path: Path, torch: str, cuda: str, which: str
) -> None:
    install_torch(environment, torch, cuda, tmp_path)
    places = with_uv(environment / "bin", gpu)
    asked = shell(line_of(stocked), places)
    assert asked.returncode == 0, asked.stderr
    assert f"GPU with sm 90, driver for CUDA 13.0, torch {torch} for CUDA {cuda}" in asked.stderr
    assert asked.stdout.count("\n") == 1
    assert "#sha256=" in asked.stdout
    installed = shell(asked.stdout, places)
    assert installed.returncode == 0, installed.stderr
    program = [environment / "bin/python", "-c", f"import {NAME}; print({NAME}.WHICH)"]
    shown = subprocess.run(program, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == f"{which} {HERE} {ARCH}"


@pytest.mark.slow
def test_with_pip_it_prints_a_command_for_pip(stocked: Server, tmp_path: Path, gpu: Path) -> None:
    environment = tmp_path / "with pip"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    places = {**os.environ, "PATH": os.pathsep.join([str(environment / "bin"), str(gpu), os.defpath])}
    asked = shell(line_of(stocked), places)
    assert "The wheel requires torch 2.1" in asked.stderr
    assert "-m pip install" in asked.stdout
    installed = shell(asked.stdout, {**places, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INDEX": "1"})
    assert installed.returncode == 0, installed.stderr
    frozen = subprocess.run([environment / "bin/python", "-m", "pip", "freeze"], capture_output=True, text=True).stdout
    assert re.search(r"chooser_pkg @ http://.*1\.0%2Bcu130\.torch2\.12-.*#sha256=[0-9a-f]{64}", frozen), frozen


def test_a_machine_that_no_wheel_is_for_is_told_why(stocked: Server, environment: Path, gpu: Path, tmp_path: Path) -> None:
    install_torch(environment, "2.9.0", "13.0", tmp_path)
    asked = shell(line_of(stocked), with_uv(environment / "bin", gpu))
    assert asked.returncode == 1
    assert asked.stdout == ""
    assert "chooser-pkg: no wheel matches this machine's torch; available: torch 2.11; torch 2.12." in asked.stderr


@pytest.mark.parametrize("failure", ["exit 9", "echo '[N/A]'", "sleep 0; printf '\\377\\376'"])
def test_an_nvidia_smi_that_does_not_work_is_no_gpu(stocked: Server, environment: Path, gpu: Path, failure: str) -> None:
    """As in a container without the driver, or with a failed GPU."""
    (gpu / "nvidia-smi").write_text(NVIDIA_SMI.format(driver="580", cuda="13.0", caps=failure))
    asked = shell(line_of(stocked), with_uv(environment / "bin", gpu))
    assert asked.returncode == 0, asked.stderr
    assert "no NVIDIA GPU" in asked.stderr
    assert "Traceback" not in asked.stderr


def test_what_is_yanked_staged_or_quarantined_is_not_offered(stocked: Server, program: ModuleType) -> None:
    address = "/project/chooser-gone/choose.py"
    assert stocked.upload(*wheel("chooser_gone", "1.0")).status_code == 200
    assert stocked.upload(*wheel("chooser_gone", "2.0rc1")).status_code == 200
    assert stocked.upload(*wheel("chooser_gone", "1.1")).status_code == 200
    run_index(stocked.root, "yank", "chooser-gone", "1.1", "--reason", "wrong")
    answer = stocked.client.get(address)
    assert answer.headers["content-type"] == "text/x-python; charset=utf-8"
    assert "chooser_gone-1.1" not in answer.text
    wheels = {item["version"]: item["rank"] for item in offers(answer.text)}
    assert wheels["1.0"] < wheels["2.0rc1"], "a pre-release comes last"
    assert stocked.client.get(address, headers={"If-None-Match": answer.headers["etag"]}).status_code == 304
    run_index(stocked.root, "status", "chooser-gone", "quarantined", "--reason", "it mines")
    assert stocked.client.get(address).status_code == 404
    assert stocked.client.get("/project/no-such/choose.py").status_code == 404


def offers(text: str) -> list[dict[str, Any]]:
    """The wheels in the served program."""
    namespace: dict[str, Any] = {"__name__": "read"}
    exec(compile(text, "choose.py", "exec"), namespace)
    wheels: list[dict[str, Any]] = namespace["json"].loads(namespace["WHEELS"])["wheels"]
    return wheels


def test_the_program_names_what_the_file_names_say(stocked: Server) -> None:
    wheels = offers(stocked.client.get("/project/chooser-pkg/choose.py").text)
    assert len(wheels) == 6
    for item in wheels:
        name = item["url"].partition("#")[0].rpartition("/")[2].replace("%2B", "+")
        assert {tuple(tag) for tag in item["tags"]} == {
            (tag.interpreter, tag.abi, tag.platform) for tag in parse_wheel_filename(name)[3]
        }
        assert stocked.client.head(item["url"].partition("#")[0]).status_code == 200


@pytest.mark.skipif(shutil.which("python3.8") is None, reason="Python 3.8 is not installed")
def test_the_oldest_python_can_run_it(stocked: Server) -> None:
    asked = shell(line_of(stocked).replace("python3", "python3.8", 1), with_uv())
    assert "Traceback" not in asked.stderr
