"""Installs uv on a node, in a version with a pinned digest."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import subprocess
import sys
import tempfile
import zipfile
from importlib import resources
from pathlib import Path

from deploy.fleet.calls import RemoteNode, call
from deploy.fleet.files import put_file
from deploy.remote.wire import Json
from gracefarm.errors import FetchError, HostError
from gracefarm.files import atomic_write
from gracefarm.process import last_line
from gracefarm.settings import SharedSettings


def pinned() -> Json:
    """Version and sha256 of uv, and the version of the Python that it installs. uv has the sha256 of this Python."""
    value: Json = json.loads((resources.files("deploy") / "data" / "uv.json").read_text())
    return value


async def ensure_uv(node: RemoteNode, about: Json, settings: SharedSettings) -> str:
    """Copy the pinned uv to a node's local disk if it is missing there. Return its path."""
    version, wheel = pinned()["version"], pinned()["wheels"].get(about["machine"])
    if wheel is None:
        raise HostError(f"{node.name}: no uv is pinned for {about['machine']}", remedy="use a node with aarch64 or x86_64")
    path = f"{about['home']}/.cache/gracefarm/uv-{version}"
    binary = await asyncio.to_thread(fetch_uv, version, wheel["tag"], wheel["sha256"], settings)
    wanted = hashlib.sha256(binary).hexdigest()
    if (await call(node, "environment.digest", {"path": path}))["sha256"] != wanted:
        await put_file(node, binary, path, mode=0o755)
    return path


def fetch_uv(version: str, tag: str, sha256: str, settings: SharedSettings) -> bytes:
    """The uv binary from a wheel with a pinned sha256. pip fetches it, with the index that is configured on this machine."""
    kept = settings.home / "deploy" / f"uv-{version}-{sha256[:16]}"
    if kept.is_file():
        return kept.read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        lock = Path(folder) / "uv.lock"
        lock.write_text(f"uv=={version} --hash=sha256:{sha256}\n")
        arguments = ["--quiet", "--no-deps", "--only-binary", ":all:", "--require-hashes", "--platform", tag, "--dest", folder]
        index = ["--index-url", settings.index_url] if settings.index_url else []
        process = subprocess.run(
            [sys.executable, "-m", "pip", "download", *arguments, *index, "--requirement", str(lock)],
            capture_output=True,
            text=True,
            check=False,
        )
        wheels = list(Path(folder).glob("*.whl"))
        if process.returncode or not wheels:
            last = last_line(process.stderr)
            remedy = "check that pip can reach a package index; `pip config list` shows which index it uses"
            if last.endswith("No module named pip"):  # virtual environments of uv have no pip
                remedy = f"install pip with `{sys.executable} -m ensurepip`"
            raise FetchError(f"uv {version} for {tag} cannot be fetched: {last}", remedy=remedy)
        with zipfile.ZipFile(io.BytesIO(wheels[0].read_bytes())) as zipped:
            binary = zipped.read(f"uv-{version}.data/scripts/uv")
    atomic_write(kept, binary)
    return binary
