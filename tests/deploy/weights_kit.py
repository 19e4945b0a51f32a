"""`deploy weights` in tests: a Hub on loopback, the real huggingface_hub, and nodes over SSH."""

from __future__ import annotations

import asyncio
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.rehearsal import hub
from deploy.steps import assignment, weights
from gracefarm.console import Console
from tests.deploy import kit

TOKEN = "hf_" + secrets.token_hex(16)
"Each test run has a different token, since a test searches all processes of this machine for it."


@pytest.fixture(scope="session")
def hub_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python with the huggingface_hub of the lock, as in the environment for downloads."""
    folder = tmp_path_factory.mktemp("download") / "env"
    uv = Path(sys.executable).with_name("uv")
    subprocess.run([uv, "venv", "-q", "--no-project", "--python", sys.executable, folder], check=True)
    lock = Path(weights.__file__).parent.parent / "data" / "download.lock"
    arguments = ["--require-hashes", "--no-deps", "--only-binary", ":all:", "-r", lock]
    subprocess.run([uv, "pip", "install", "-q", "--python", folder / "bin" / "python", *arguments], check=True)
    return str(folder / "bin" / "python")


def bring(folder: Path, served: hub.Hub, python: str, *, count: int = 3, **more: object) -> weights.Brought:
    """Run `deploy weights` once, with a share that all nodes have."""
    return asyncio.run(bringing(folder, served, python, count=count, **more))


async def bringing(folder: Path, served: hub.Hub, python: str, *, count: int = 3, **more: object) -> weights.Brought:
    async with kit.nodes(folder, count) as nodes:
        return await weights.bring(nodes, spec(folder, served, python, **more), Console(as_json=False))


def spec(folder: Path, served: hub.Hub, python: str, **more: object) -> weights.WeightsSpec:
    values = {"root": str(folder / "share"), "repo": "org/model", "endpoint": served.url, "python": python, "workers": 4}
    return weights.WeightsSpec(**{**values, **more})  # type: ignore[arg-type]


def content(outcome: weights.Brought) -> dict[str, bytes]:
    base = Path(outcome.folder)
    return {str(path.relative_to(base)): path.read_bytes() for path in base.rglob("*") if path.is_file()}


def wanted(files: dict[str, bytes]) -> dict[str, bytes]:
    return {path: data for path, data in files.items() if not assignment.skipped(path, assignment.SKIP)}


@pytest.fixture
def homes(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


def bring_again(folder: Path, served: hub.Hub, python: str, **more: object) -> weights.Brought:
    """Repeat the command, with new connections and the same share."""
    for home in folder.glob("home-*"):
        shutil.rmtree(home)
    return bring(folder, served, python, **more)


def workers_below(folder: Path) -> list[int]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").readlink().is_relative_to(folder) and b"runpy" in (process / "cmdline").read_bytes():
                found.append(int(process.name))
        except OSError:
            continue
    return found


async def served_count(served: hub.Hub, count: int, seconds: float = 60) -> None:
    """Wait until this number of files was downloaded completely."""
    deadline = time.monotonic() + seconds
    while sum(map(len, served.served.values())) < count:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


def each_once(served: hub.Hub) -> bool:
    """Whether each wanted file was downloaded completely exactly once, by any node."""
    return sorted(path for paths in served.served.values() for path in paths) == sorted(wanted(served.files))
