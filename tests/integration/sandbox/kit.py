"""The users of the sandbox in its tests: the user of the tests, and an ordinary user. The root has the host's files."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from builder.box import sandbox
from builder.box.sandbox import BindMount, Outcome, Sandbox

PROJECT = Path(sandbox.__file__).parents[2]
PYTHON = f"/python/bin/python{sys.version_info.major}.{sys.version_info.minor}"
MIB = 1 << 20

DRIVER = """
import dataclasses, json, sys
from pathlib import Path
from builder.box import sandbox
spec = json.loads(sys.argv[1])
mounts = tuple(sandbox.BindMount(source=Path(s), target=t, writable=w) for s, t, w in spec["mounts"])
box = sandbox.Sandbox(root=Path("/"), mounts=mounts, environment=spec["environment"], workdir=spec["workdir"],
                      memory=spec["memory"], network=spec["network"], devices=tuple(spec["devices"]))
{prologue}
outcome = sandbox.run(box, spec["argv"], log=Path(spec["log"]), **spec["options"])
print(json.dumps(dataclasses.asdict(outcome)))
"""


@dataclass(frozen=True, kw_only=True)
class User:
    """A user of the sandbox, with a folder."""

    uid: int
    folder: Path
    python: str
    prefix: tuple[str, ...]
    "The start of a command line that changes to this user."

    @property
    def build(self) -> Path:
        return self.folder / "build"

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def box(self, **changes: object) -> Sandbox:
        """A sandbox with a Python at PYTHON and a writable /build."""
        mounts = (
            BindMount(source=Path(sys.base_prefix if not self.prefix else "/usr"), target="/python"),
            BindMount(source=self.build, target="/build", writable=True),
        )
        plain = Sandbox(
            root=Path("/"),
            mounts=mounts,
            environment={"PATH": "/usr/bin:/bin", "HOME": sandbox.HOME, "LANG": "C.UTF-8"},
            workdir="/build",
            memory=1024 * MIB,
        )
        return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]

    def driver(self, box: Sandbox, argv: Sequence[str], *, prologue: str = "", **options: object) -> list[str]:
        """The command line of a builder that runs one sandbox as this user."""
        spec = {
            "mounts": [(str(mount.source), mount.target, mount.writable) for mount in box.mounts],
            "environment": dict(box.environment),
            "workdir": box.workdir,
            "memory": box.memory,
            "network": box.network,
            "devices": box.devices,
            "argv": list(argv),
            "log": str(self.log),
            "options": options,
        }
        return [*self.prefix, self.python, "-c", DRIVER.replace("{prologue}", prologue), json.dumps(spec)]

    def run(self, *argv: str, box: Sandbox | None = None, **options: object) -> Outcome:
        box = box or self.box()
        if not self.prefix:
            return sandbox.run(box, argv, log=self.log, **options)  # type: ignore[arg-type]
        done = subprocess.run(self.driver(box, argv, **options), env=driver_environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        fields = json.loads(done.stdout)
        return Outcome(**{**fields, "reached": tuple(fields["reached"])})

    def python_run(self, script: str, *, box: Sandbox | None = None, **options: object) -> Outcome:
        return self.run(PYTHON, "-c", textwrap.dedent(script), box=box, **options)

    @property
    def text(self) -> str:
        return self.log.read_text()


def driver_environment() -> dict[str, str]:
    """The environment of a builder in another process. The sandbox must not get the secret in it."""
    packages = f"{PROJECT}:{sysconfig.get_path('purelib')}"
    return {"PATH": os.environ["PATH"], "PYTHONPATH": packages, "TWINE_PASSWORD": "hunter2"}


def nobody() -> tuple[str, tuple[str, ...]] | None:
    """An interpreter that the ordinary user may run, and the command that changes to this user; None without such a Python."""
    become = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    probe = "import subprocess, sys, builder.box.sandbox; subprocess.run([sys.executable, '-c', ''], check=True)"
    for python in (sys.executable, "/usr/bin/python3"):
        tried = subprocess.run([*become, python, "-c", probe], env=driver_environment(), capture_output=True, cwd="/")
        if tried.returncode == 0:
            return python, become
    return None


@contextlib.contextmanager
def acting_as(name: str) -> Iterator[User]:
    """The user of the tests (`self`), or the ordinary one."""
    uid, python, prefix = os.getuid(), sys.executable, ()
    if name == "nobody":
        found = nobody()
        if found is None:
            pytest.skip("no interpreter that the ordinary user may run can read this checkout")
        uid, (python, prefix) = 65534, found
    folder = Path(tempfile.mkdtemp(prefix="gracefarm-test-"))
    someone = User(uid=uid, folder=folder, python=python, prefix=prefix)
    someone.build.mkdir()
    for path in (folder, someone.build):
        os.chown(path, uid, uid if prefix else -1)
    try:
        yield someone
    finally:
        shutil.rmtree(folder)


USERS = ["self", "nobody"] if os.getuid() == 0 else ["self"]


def processes(word: str) -> list[int]:
    """Processes with `word` in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word.encode() in path.read_bytes() and path.parent.name != str(os.getpid()):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.02)
