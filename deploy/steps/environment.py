"""The environment as an artifact: named by its content, built once, proven on every node, switched, rolled back, collected."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import re
import shlex
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from deploy.fleet.calls import Json, Target, call, joined, on_all, try_all
from gracefarm.console import Console
from gracefarm.errors import ConfigError, FetchError, HostError, InstallError
from gracefarm.files import atomic_write
from gracefarm.settings import Settings

SCHEMA = 1
"Part of every id: another way of building is another environment."
JOBS = "build-"
"How the names of the detached jobs begin, one for each link."
PythonSource = Literal["system", "managed", "conda"]


class Module(BaseModel):
    """One import of the matrix; `gpu`: skipped, with the reason, where no GPU can be used."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    module: str
    gpu: bool = False
    code: str | None = None
    "Instead of `import MODULE`."


class Matrix(BaseModel):
    """What must work on every node before an engine's environment becomes active."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    modules: tuple[Module, ...]
    commands: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Spec:
    """An environment to be had."""

    root: str
    "Our folder on the shared file system."
    lock: str
    "Text of requirements.lock: every wheel with its sha256."
    index: str | None
    "Simple API that serves them; None: what uv on the node takes by itself."
    python: str = "3.11"
    source: PythonSource = "system"
    mirror: str | None = None
    "Of managed Pythons; None: where uv takes them from by itself."
    engine: str = "aphrodite"
    link: Literal["env", "download"] = "env"
    set_name: str = ""
    seconds: float = 600
    "For each import: the first one over a network file system is slow."


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What was done: its id, whether it was built now and whether it became active now."""

    id: str
    built: bool
    switched: bool
    rows: Mapping[str, Sequence[Json]]
    "Node to the rows of its import matrix."


def matrix(engine: str) -> Matrix:
    """The modules and commands of an engine (deploy/data/imports.toml).

    Raises:
        ConfigError: the engine is not known there.
    """
    table = tomllib.loads((resources.files("deploy") / "data" / "imports.toml").read_text())
    if engine not in table:
        raise ConfigError(f"no import matrix for engine {engine!r}", remedy=f"known: {', '.join(sorted(table))}")
    return Matrix.model_validate(table[engine])


def download_lock() -> str:
    """The lock of the environment that downloads weights: huggingface_hub >= 1, which an engine's transformers forbids."""
    return (resources.files("deploy") / "data" / "download.lock").read_text()


def identity(lock: str, *, python: str, source: str, machine: str) -> str:
    """The name of an environment: its pins and digests, its Python and its machine; comments and order do not enter it."""
    text = re.sub(r"\\\n\s*", " ", lock)
    pins = sorted(" ".join(line.split()) for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#"))
    for line in pins:
        if "--hash=sha256:" not in line:
            raise ConfigError(f"the lock has no sha256 for {line.split()[0]}", remedy="every line needs --hash=sha256:…")
    content = json.dumps([SCHEMA, pins, python, source, machine])
    return hashlib.sha256(content.encode()).hexdigest()[:32]


async def up(targets: Sequence[Target], spec: Spec, settings: Settings, console: Console) -> Outcome:
    """Build it on the first node unless it is there, import it on all, and only then make it active.

    Raises:
        InstallError: the index lacks a file, or a node cannot import what was built: the active one stays.
        DigestError: the index gave other bytes than the lock names.
        HostError: a node does not see the environment, or has no such Python.
    """
    head = targets[0]
    wanted = str(pinned()["python"]) if spec.source == "managed" else spec.python
    about = await call(head, "environment.about", {"python": wanted, "source": spec.source})
    identifier = identity(spec.lock, python=about["python"], source=spec.source, machine=about["machine"])
    folder = f"{spec.root}/envs/{identifier}"
    listed = await call(head, "environment.listing", {"root": spec.root})
    built = False
    if identifier not in [one["id"] for one in listed["environments"]]:
        request = {
            "root": spec.root,
            "id": identifier,
            "lock": spec.lock,
            "index": spec.index,
            "python": {"source": spec.source, "version": wanted, "mirror": spec.mirror},
            "uv": await ensure_uv(head, about, settings),
            "engine": spec.engine,
            "set": spec.set_name,
        }
        made = await call(
            head, "environment.build", request, job=f"{JOBS}{spec.link}", on_event=lambda one: _tell(console, head.name, one)
        )
        built = bool(made["built"])
        if built:
            console.step(spec.link, f"{identifier[:12]} built on {head.name} in {made['build_s']:.0f} s")
    rows = await prove(targets, folder, matrix(spec.engine), spec.seconds)
    switched = await call(head, "environment.switch", {"root": spec.root, "link": spec.link, "id": identifier})
    return Outcome(id=identifier, built=built, switched=switched["switched"], rows=rows)


async def prove(targets: Sequence[Target], folder: str, wanted: Matrix, seconds: float) -> dict[str, list[Json]]:
    """Every import and command on every node.

    Raises:
        InstallError: with every node and module that failed.
    """

    async def one(node: Target) -> Json:
        return await call(
            node,
            "environment.matrix",
            {
                "environment": folder,
                "modules": [each.model_dump() for each in wanted.modules],
                "commands": [list(each) for each in wanted.commands],
                "seconds": seconds,
            },
        )

    found = await on_all(targets, one)
    bad = [f"{node}: {row['name']}: {row['error']}" for node, each in found.items() for row in each["rows"] if "error" in row]
    if bad:
        raise InstallError(
            f"the environment does not work everywhere: {'; '.join(bad[:4])}" + ("; …" if len(bad) > 4 else ""),
            remedy="it was not made active; `deploy env matrix` shows every row, and `deploy preflight` what a node lacks",
        )
    return {node: each["rows"] for node, each in found.items()}


async def rollback(targets: Sequence[Target], root: str, link: str = "env") -> Json:
    """Back to the environment that was active before. Raises HostError when there is none."""
    return await call(targets[0], "environment.rollback", {"root": root, "link": link})


async def listing(targets: Sequence[Target], root: str) -> Json:
    """Finished environments, newest first; half-built ones."""
    return await call(targets[0], "environment.listing", {"root": root})


async def collect(targets: Sequence[Target], root: str, *, keep: int = 2, grace: float = 3600) -> Json:
    """Remove old environments that no process on any node runs from. A node that cannot be asked stops it.

    `keep`: generations that stay for a roll-back; `grace`: seconds for which a new one stays though it is not active yet.
    """
    found, bad = await try_all(targets, lambda node: call(node, "environment.users", {"root": root}))
    if bad:
        raise joined(bad, len(targets))
    used = sorted({one for each in found.values() for one in each["used"]})
    return await call(targets[0], "environment.collect", {"root": root, "used": used, "keep": keep, "grace": grace})


def _tell(console: Console, node: str, event: Json) -> None:
    if event["event"] == "step":
        console.step("env", f"{node}: {event['text']}")
    elif event["event"] == "wait":
        console.step("wait", f"{node}: it is being built already ({event['owner']}); waiting for it")


def pinned() -> Json:
    """uv by version and sha256, and the Python that it brings, whose sha256 stands in uv."""
    value: Json = json.loads((resources.files("deploy") / "data" / "uv.json").read_text())
    return value


async def ensure_uv(node: Target, about: Json, settings: Settings) -> str:
    """uv at the pinned version on a node's own disk; sent there when it is missing. Its path."""
    version, wheel = pinned()["version"], pinned()["wheels"].get(about["machine"])
    if wheel is None:
        raise HostError(f"{node.name}: no uv is pinned for {about['machine']}", remedy="aarch64 and x86_64 are supported")
    path = f"{about['home']}/.cache/gracefarm/uv-{version}"
    binary = await asyncio.to_thread(fetch_uv, version, wheel["tag"], wheel["sha256"], settings)
    wanted = hashlib.sha256(binary).hexdigest()
    if (await call(node, "environment.digest", {"path": path}))["sha256"] != wanted:
        quoted = shlex.quote(path)
        command = (
            f'set -e; mkdir -p "$(dirname {quoted})"; cat > {quoted}.$$; chmod 755 {quoted}.$$; mv -f {quoted}.$$ {quoted}'
        )
        done = await node.shell.stream(f"sh -c {shlex.quote(command)}", stdin=binary, on_line=lambda _line: None)
        if done.code or (await call(node, "environment.digest", {"path": path}))["sha256"] != wanted:
            raise HostError(
                f"{node.name}: uv could not be placed at {path}: {done.stderr.strip()}", remedy="free space in the home"
            )
    return path


def fetch_uv(version: str, tag: str, sha256: str, settings: Settings) -> bytes:
    """The uv binary of a wheel whose sha256 is pinned, by way of pip, which knows this machine's index."""
    kept = settings.home / "deploy" / f"uv-{version}-{sha256[:16]}"
    if kept.is_file():
        return kept.read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        lock = Path(folder) / "uv.lock"
        lock.write_text(f"uv=={version} --hash=sha256:{sha256}\n")
        arguments = ["--quiet", "--no-deps", "--only-binary", ":all:", "--require-hashes", "--platform", tag, "--dest", folder]
        index = ["--index-url", settings.index_url] if settings.index_url else []
        done = subprocess.run(
            [sys.executable, "-m", "pip", "download", *arguments, *index, "--requirement", str(lock)],
            capture_output=True,
            text=True,
            check=False,
        )
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            remedy = "pip must reach a Python index: `pip config list`"
            if last.endswith("No module named pip"):  # a virtual environment that uv made has none
                remedy = f"`{sys.executable} -m ensurepip`"
            raise FetchError(f"uv {version} for {tag}: {last}", remedy=remedy)
        with zipfile.ZipFile(io.BytesIO(wheels[0].read_bytes())) as zipped:
            binary = zipped.read(f"uv-{version}.data/scripts/uv")
    atomic_write(kept, binary)
    return binary
