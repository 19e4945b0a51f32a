"""Tiny packages that the tests build, and functions that write source archives, recipes and stacks for them."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent

BACKEND = """
import zipfile, os, sys, subprocess

def wheel(folder, name="tiny", version="1.0", tag="py3-none-any", files=None):
    path = os.path.join(folder, f"{name}-{version}-{tag}.whl")
    info = f"{name}-{version}.dist-info"
    pure = "true" if tag.endswith("-any") else "false"
    content = {
        f"{name}/__init__.py": b"answer = 42\\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n".encode(),
        f"{info}/WHEEL": f"Wheel-Version: 1.0\\nGenerator: tiny\\nRoot-Is-Purelib: {pure}\\nTag: {tag}\\n".encode(),
        **(files or {}),
    }
    import base64, hashlib
    rows = [
        f"{key},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b'=').decode()},{len(data)}"
        for key, data in content.items()
    ]
    content[f"{info}/RECORD"] = ("\\n".join([*rows, f"{info}/RECORD,,"]) + "\\n").encode()
    with zipfile.ZipFile(path, "w") as archive:
        for key, data in content.items():
            archive.writestr(key, data)
    return os.path.basename(path)

def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
"""


def backend(body: str) -> dict[str, str | bytes]:
    """A source tree whose build runs only the statements `body`. They call `wheel(...)`, and return the name of the wheel."""
    lines = "".join(f"    {line}\n" for line in body.strip().splitlines())
    return {
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
        "backend.py": BACKEND + lines,
    }


def tree(name: str) -> dict[str, str | bytes]:
    """The files of one of the projects in this folder."""
    folder = HERE / name
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def archive(files: Mapping[str, str | bytes], top: str = "project-1.0") -> bytes:
    """A .tar.gz of `files` in one folder. The bytes are the same every time."""
    import gzip

    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        for name, content in sorted(files.items()):
            data = content.encode() if isinstance(content, str) else content
            entry = tarfile.TarInfo(f"{top}/{name}")
            entry.size, entry.mtime, entry.mode = len(data), 1_700_000_000, 0o644
            tar.addfile(entry, io.BytesIO(data))
    return gzip.compress(raw.getvalue(), mtime=0)


def toml(value: object) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{json.dumps(str(key))} = {toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml(item) for item in value) + "]"
    return json.dumps(value)


def write_recipe(project: Path, name: str, files: Mapping[str, str | bytes], tables: Mapping[str, Any]) -> Path:
    """Write an archive of `files`, and recipes/NAME/recipe.toml beside it, which has its file:// URL and its digest."""
    folder = project / "recipes" / name
    folder.mkdir(parents=True, exist_ok=True)
    data = archive(files)
    (folder / "source.tar.gz").write_bytes(data)
    values: dict[str, Any] = {
        "name": name,
        "version": "1.0",
        "license": "Apache-2.0",
        "stack": "bare",
        "source": {"kind": "file", "url": (folder / "source.tar.gz").as_uri(), "sha256": hashlib.sha256(data).hexdigest()},
        "build": {"cuda": False, "memory_per_job": "1GiB"},
        "smoke": {"imports": [name]},
    }
    values |= tables
    (folder / "recipe.toml").write_text("".join(f"{key} = {toml(value)}\n" for key, value in values.items()))
    return folder


BUILD_TOOLS = ("build", "packaging", "pip", "setuptools", "wheel")
COMPILER = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-cccl", "nvidia-cuda-runtime")
OTHER_TOOLS = ("nvidia-cuda-cuobjdump", "cmake")


def write_stacks(source: Path, into: Path) -> None:
    """Write copies of the real stacks, and two copies of cu130 without torch, which do not require gigabytes.

    `bare` has no CUDA compiler. `cuda` has the CUDA compiler and ninja.
    """
    shutil.copytree(source, into)
    _without_torch(source / "cu130", into / "bare", BUILD_TOOLS, ())
    _without_torch(source / "cu130", into / "cuda", (*BUILD_TOOLS, "ninja"), (*COMPILER, *OTHER_TOOLS))


def _without_torch(source: Path, into: Path, environment: Sequence[str], compiler: Sequence[str]) -> None:
    """Write a copy of a stack that requires only these packages, in the versions of the stack's locks."""
    shutil.copytree(source, into)
    text = (into / "stack.toml").read_text()
    text = re.sub(r"^name = .*$", f'name = "{into.name}"', text, count=1, flags=re.M)
    text = re.sub(r"^\[torch\]\n(?:(?!\[).*\n)*", "", text, flags=re.MULTILINE)
    text = re.sub(r"^\[no_lock\]\n(?:(?!\[).*\n)*", "", text, flags=re.MULTILINE)
    wanted = iter((environment, compiler))
    text = re.sub(
        r"^requirements = \[\n(?:(?!\]).*\n)*\]", lambda _: f"requirements = {toml(next(wanted))}", text, flags=re.MULTILINE
    )
    (into / "stack.toml").write_text(text)
    keep = {*environment, *compiler, "pyproject-hooks"}
    for lock in into.glob("requirements*.lock"):
        blocks = re.findall(r"^(# \S+\.whl\n)((?!#)\S[^\n]*)", lock.read_text(), flags=re.M)
        lock.write_text("".join(f"{file}{pin}\n" for file, pin in blocks if pin.split("==")[0] in keep))
    tomllib.loads((into / "stack.toml").read_text())


@dataclass(frozen=True, kw_only=True)
class Done:
    """A finished run of the builder."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        """All output, with white space collapsed, so that a test can search for wrapped sentences."""
        return " ".join((self.out + self.err).split())


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """The environment of a builder under test."""
    return {**os.environ, "PYTHONPATH": str(HERE.parent.parent), "COLUMNS": "200", "CI": "true", **variables}


def run_builder(arguments: Sequence[str], variables: Mapping[str, str], timeout: float = 1200, umask: int = -1) -> Done:
    """Run `python -m builder ARGUMENTS` to its end. The umask -1 is that of this process."""
    done = subprocess.run(
        [sys.executable, "-m", "builder", *arguments],
        env=environment(variables),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        umask=umask,
    )
    return Done(code=done.returncode, out=done.stdout, err=done.stderr)
