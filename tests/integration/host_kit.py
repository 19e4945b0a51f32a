"""Shared code of the tests of `--toolchain host`: a user's environment, a tiny C extension that uses it, and a fake torch."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import uv

from builder.cli import cli
from builder.toolchains import host_tools
from gracefarm.errors import GracefarmError
from tests import projects
from tests.conftest import Farm, new_farm

FAKE_TORCH = """
from types import SimpleNamespace
cuda = SimpleNamespace(
    is_available=lambda: {seen}, get_device_name=lambda: "a fake GPU", get_device_capability=lambda: {capability}
)
"""


def python311() -> str:
    """A Python 3.11, for which the locks of the stacks are."""
    for candidate in ("/usr/bin/python3.11", shutil.which("python3.11") or sys.executable):
        if Path(candidate).exists() and host_tools.probe(Path(candidate)).minor == "3.11":
            return candidate
    pytest.skip("no Python 3.11 on this machine")


@pytest.fixture(scope="session")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's environment: without a lock, and with only the packages that a C extension requires to build."""
    folder = tmp_path_factory.mktemp("own") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    install = [uv.find_uv_bin(), "pip", "install", "--quiet", "--python", folder / "bin/python3"]
    subprocess.run([*install, "build", "ninja", "setuptools", "wheel"], check=True)
    return folder


@dataclass(frozen=True, kw_only=True)
class Built:
    """The tiny C extension, built once with the user's environment. The recipe has a GPU test that must not run."""

    farm: Farm
    done: projects.Done
    wheel: Path


@pytest.fixture(scope="module")
def built(shared_home: Path, own: Path) -> Iterator[Built]:
    with new_farm(shared_home) as farm:
        tiny_c(farm)
        (farm.settings.project / "recipes/tiny_c/smoke_gpu.py").write_text("raise SystemExit('it ran')\n")
        done = farm.run("build", "tiny_c", "--toolchain", "host", "--environment", str(own))
        assert done.code == 0, done.said
        yield Built(farm=farm, done=done, wheel=Path(done.out.strip()))


def called(farm: Farm, patch: pytest.MonkeyPatch, *arguments: str, **variables: str) -> tuple[int, str]:
    """Run the command line in this process, which saves the imports. Return the exit code, and the sentence of the error."""
    for name, value in {**farm.environment, **variables}.items():
        patch.setenv(name, value)
    try:
        cli.main(args=list(arguments), standalone_mode=False, prog_name="builder")
    except GracefarmError as error:
        return int(error.exit_code), error.cause
    return 0, ""


def tiny_c(farm: Farm, **tables: object) -> None:
    farm.recipe("tiny_c", projects.tree("tiny_c"), name="tiny-c", smoke={"imports": ["tiny_c", "tiny_c._core"]}, **tables)


PRELOAD = """
import ctypes, nvidia
from pathlib import Path
(library,) = Path(next(iter(nvidia.__path__))).glob("*/lib/libcudart.so.*")
ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
"""
"It loads CUDA's library like `import torch`, but does not require gigabytes."


def fake_torch(
    own: Path, into: Path, *, version: str, cuda: str | None, seen: bool = True, capability: str = "(9, 0)"
) -> Path:
    """Write an environment with a fake torch, which reports these versions and this GPU."""
    shutil.copytree(own, into, symlinks=True)
    (site,) = into.glob("lib/*/site-packages")
    (site / "torch").mkdir()
    (site / "torch/__init__.py").write_text(FAKE_TORCH.format(seen=seen, capability=capability))
    (site / "torch/version.py").write_text(f"__version__ = {version!r}\ncuda = {cuda!r}\n")
    (site / "torch-1.dist-info").mkdir()
    (site / "torch-1.dist-info/METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    return into
