"""Where the nodes' environments come from: our own index, with Ray from the Python index and the stand-in for the engine.

The index is a program of its own and is used as one. What it mirrored once stays in the user's cache, so that a second
rehearsal fetches nothing; the set is named by its content, for a published set never changes.
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
"For a server of ours to listen."


@dataclass(frozen=True, kw_only=True)
class Source:
    """A set that is ready to be served."""

    root: Path
    "The index's folder."
    set_name: str
    lock: str
    "Text of the nodes' requirements.lock: Ray and the stand-in, every wheel by its sha256."

    def path(self) -> str:
        """Of the set's simple API."""
        return f"/{self.set_name}/simple/"


def prepare(home: Path, console: Console) -> Source:
    """Bring the set's wheels into the index in `home`, unless they are there.

    Raises:
        FetchError: the Python index does not give a wheel of the lock. HostError: our own index does not start.
    """
    wheel = standin.build(home / "rehearsal" / "wheels")
    machine = os.uname().machine
    text = locks.on(locks.committed("rehearsal"), machine) + wheel.pin
    every = locks.merged(text, locks.on(locks.committed("rehearsal-download"), machine))
    name = f"rehearsal-{hashlib.sha256(every.encode()).hexdigest()[:12]}"
    source = Source(root=home / "rehearsal" / "index", set_name=name, lock=text)
    with lock(home / "rehearsal" / "index.lock", lambda: console.step("wait", "another rehearsal fills the index")):
        try:
            sets = index_command(source.root, "stage", "list")
        except HostError as error:  # another version's catalogue, or a damaged one; there is nothing in it but a cache
            console.step("wheels", f"{error.cause}: made anew")
            remove_tree(source.root)
            sets = []
        if any(entry["name"] == name and entry["state"] == "published" for entry in sets):
            return source
        console.step("wheels", f"{every.count('==')} wheels of Ray and huggingface_hub into our index, once")
        _upload(source.root, wheel)
        path = home / "rehearsal" / "set.lock"
        path.write_text(every)
        index_command(source.root, "mirror", str(path), "--set", name)
        index_command(source.root, "stage", "publish", name)
    return source


def private(home: Path, source: Source, folder: Path) -> Source:
    """The index once more in `folder`, for one rehearsal: a root has one server, and two people may rehearse at once.

    Its wheels are hard links: they never change.
    """
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
    """A command of the index; its answer."""
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
            f"index {arguments[0]}: {reason}", remedy=last.get("remedy") or "is the Python index reachable: `pip config list`"
        )
    return answers[-1]


def _upload(root: Path, wheel: standin.StandinWheel) -> None:
    """As anybody would: a hosted name, a token, `uv publish`."""
    index_command(root, "host", standin.NAME)
    token = index_command(root, "token", "create", "--name", "rehearsal", "--expires", "1h")["token"]
    argv = [sys.executable, "-m", "index", "--root", str(root), "--json", "serve", "--port", "0"]
    with listening(argv) as url:
        publish = [sys.executable, "-m", "uv", "publish", "--quiet", "--no-config", "--publish-url", f"{url}/legacy/"]
        env = {**os.environ, "UV_PUBLISH_TOKEN": token}
        process = subprocess.run([*publish, str(wheel.path)], env=env, capture_output=True, text=True, check=False)
        if process.returncode:
            raise HostError(
                f"uploading the stand-in: {process.stderr.strip()}", remedy=f"remove {root} and repeat the command"
            )


@contextmanager
def listening(argv: Sequence[str]) -> Iterator[str]:
    """A server of ours that says `{"event": "listening", "url": …}` or its bare address on stdout, until the block ends.

    Raises:
        HostError: it does not; with its last words.
    """
    with subprocess.Popen(
        argv,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is for whoever started us, and what follows it may still need the server
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
    raise HostError(f"a server of the rehearsal does not start: {reason}", remedy="repeat the command")
