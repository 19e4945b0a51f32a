"""The source of the nodes' environments: an index (`index serve`), with Ray from PyPI and the simulated engine.

The index is a separate program and is run as one. Mirrored wheels stay in the user's cache, so a second rehearsal downloads
nothing. The set is named by its content, since a published set never changes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deploy.rehearsal import locks, standin
from gracefarm.console import Console
from gracefarm.errors import FetchError, GracefarmError, HostError
from gracefarm.files import lock, remove_tree
from gracefarm.process import last_line

SECONDS = 60
"Seconds to wait until a server listens."


@dataclass(frozen=True, kw_only=True)
class Source:
    """A set in the index, ready to be served."""

    root: Path
    "The folder of the index."
    set_name: str
    lock: str
    "Text of the nodes' requirements.lock: Ray and the simulated engine, every wheel with its sha256."
    count: int
    "Number of wheels in the set: those of `lock`, and those with which the nodes download the weights."

    def path(self) -> str:
        """Path of the set's simple API."""
        return f"/{self.set_name}/simple/"


def prepare(home: Path, console: Console) -> Source:
    """Add the set's wheels to the index in `home`, unless it has them.

    Raises:
        FetchError: PyPI does not have a wheel of the lock.
        HostError: the index does not start.
    """
    wheel = standin.build(home / "rehearsal" / "wheels")
    machine = os.uname().machine
    text = locks.on(locks.committed("rehearsal"), machine) + wheel.pin
    every = locks.merged(text, locks.on(locks.committed("rehearsal-download"), machine))
    name = f"rehearsal-{hashlib.sha256(every.encode()).hexdigest()[:12]}"
    source = Source(root=home / "rehearsal" / "index", set_name=name, lock=text, count=every.count("=="))
    with lock(
        home / "rehearsal" / "index.lock",
        lambda: console.step("wait", "another rehearsal is filling the index; waiting for it"),
    ):
        try:
            sets = index_command(source.root, "stage", "list")
        except HostError as error:  # the catalogue is damaged or from another version; it is only a cache
            console.step("wheels", f"{error.cause}; replacing the index")
            remove_tree(source.root)
            sets = []
        if any(entry["name"] == name and entry["state"] == "published" for entry in sets):
            return source
        console.step(
            "wheels", f"adding {source.count} wheels of Ray, huggingface_hub and the simulated engine to the rehearsal's index"
        )
        _upload(source.root, wheel)
        path = home / "rehearsal" / "set.lock"
        path.write_text(every)
        index_command(source.root, "mirror", str(path), "--set", name)
        index_command(source.root, "stage", "publish", name)
    return source


def private(home: Path, source: Source, folder: Path) -> Source:
    """A copy of the index in `folder` for one rehearsal, since a root can have only one server. Its wheels are hard links."""
    with lock(home / "rehearsal" / "index.lock"):
        folder.mkdir(parents=True)
        for path in sorted(source.root.rglob("*")):
            place = folder / path.relative_to(source.root)
            if path.is_dir():
                place.mkdir()
            elif path.suffix == ".whl" or source.root / "files" in path.parents:
                place.hardlink_to(path)
            else:
                shutil.copy2(path, place)
    return replace(source, root=folder)


def index_command(root: Path, *arguments: str) -> Any:
    """Run a command of the index. Return its answer."""
    process = subprocess.run(
        [sys.executable, "-m", "index", "--root", str(root), "--json", *arguments], capture_output=True, text=True, check=False
    )
    answers = [json.loads(line) for line in process.stdout.splitlines() if line.startswith(("{", "["))]
    if process.returncode:
        last: dict[str, str] = next(
            (answer for answer in reversed(answers) if isinstance(answer, dict) and "text" in answer), {}
        )
        reason = last.get("text") or last_line(process.stderr)
        kind: type[GracefarmError] = FetchError if arguments[0] == "mirror" else HostError
        raise kind(
            f"index {arguments[0]}: {reason}",
            remedy=last.get("remedy")
            or "check that pip can reach a package index; `pip config list` shows which index it uses",
        )
    return answers[-1]


def _upload(root: Path, wheel: standin.StandinWheel) -> None:
    """Upload a wheel in the usual way: with a hosted name, a token, and `uv publish`."""
    index_command(root, "host", standin.NAME)
    token = index_command(root, "token", "create", "--name", "rehearsal", "--expires", "1h")["token"]
    argv = [sys.executable, "-m", "index", "--root", str(root), "--json", "serve", "--port", "0"]
    with listening(argv) as url:
        publish = [sys.executable, "-m", "uv", "publish", "--quiet", "--no-config", "--publish-url", f"{url}/legacy/"]
        env = {**os.environ, "UV_PUBLISH_TOKEN": token}
        process = subprocess.run([*publish, str(wheel.path)], env=env, capture_output=True, text=True, check=False)
        if process.returncode:
            raise HostError(
                f"cannot upload the simulated engine: {process.stderr.strip()}",
                remedy=f"remove {root}, then repeat the command",
            )


@contextmanager
def listening(argv: Sequence[str]) -> Iterator[str]:
    """Run a server within the block. It prints `{"event": "listening", "url": …}` or its URL on stdout.

    Raises:
        HostError: it does not start; with its last line.
    """
    with subprocess.Popen(
        argv,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C must not stop the server, which cleanup may still need
    ) as process:
        try:
            yield _address(process)
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
            process.kill()


def _address(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    assert process.stderr
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        line = process.stdout.readline().strip()
        if line.startswith("http"):
            return line
        if '"listening"' in line:
            return str(json.loads(line)["url"]).rstrip("/")
        if not line and process.poll() is not None:
            break
    reason = last_line(process.stderr.read(), "it ended") if process.poll() is not None else "no answer"
    raise HostError(f"a server of the rehearsal did not start: {reason}", remedy="repeat the command")
