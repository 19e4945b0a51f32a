"""A deployment from ips.txt to streamed tokens on nodes of this machine, with the commands that a user would run."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import platform
import re
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from deploy.engine.completion import CompletionServer, Prompt
from deploy.measure.bench import query
from deploy.nodes import template
from deploy.rehearsal import source
from deploy.rehearsal.rig import GATEWAY, MOUNT, USER, Rig, check_machine, open_rig
from deploy.steps import uv
from gracefarm.console import Console
from gracefarm.errors import EngineError, NodeError
from gracefarm.files import remove_tree
from gracefarm.settings import SharedSettings

REPO = "rehearsal/Llama-405B-in-small"
INDEX_PORT, HUB_PORT = 8090, 8091
PROMPT = "Write a sentence about wheels."
LARGEST_TP = 8
OUTPUT_SECONDS = 600
"Timeout of one command in seconds. The engine's timeouts are shorter."


@dataclass(frozen=True, kw_only=True)
class CommandRun:
    """A command and its result."""

    name: str
    argv: tuple[str, ...]
    seconds: float
    output: str = field(repr=False)


@dataclass(kw_only=True)
class Rehearsal:
    """The nodes, the servers and the deployment's folder."""

    room: Rig
    folder: Path
    "The folder of deploy.toml."
    console: Console
    index: str
    "URL of the set's simple API."
    environ: Mapping[str, str] = field(default_factory=dict)
    steps: list[CommandRun] = field(default_factory=list)

    def command(self, *arguments: str) -> CommandRun:
        """Run `deploy …` in the nodes' network, and print the command, its output and its time.

        Raises:
            NodeError: it failed.
        """
        argv = ("deploy", *arguments)
        self.console.step("run", " ".join(argv))
        begin = time.monotonic()
        code, output = self._run(arguments)
        seconds = time.monotonic() - begin
        self.console.event("command", f"{'':9}  {seconds:.1f} s", argv=argv, seconds=round(seconds, 2), returncode=code)
        if code:
            raise NodeError(
                f"`{' '.join(argv)}` failed with exit code {code}",
                remedy="fix the error above, then repeat the rehearsal",
                repeat=f"deploy rehearse --nodes {len(self.room.nodes)}",
            )
        step = CommandRun(name=arguments[0], argv=argv, seconds=seconds, output=output)
        self.steps.append(step)
        return step

    def _start(self, arguments: Sequence[str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.room.command(["env", "--chdir", str(self.folder), sys.executable, "-m", "deploy", *arguments]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **self.environ},
        )

    def _run(self, arguments: Sequence[str]) -> tuple[int, str]:
        kept = []
        with self._start(arguments) as process:
            assert process.stdout
            late = threading.Timer(OUTPUT_SECONDS, process.kill)
            late.start()
            try:
                for line in process.stdout:
                    kept.append(line)
                    self.console.event("output", f"{'':9}  {line.rstrip()}")
                return process.wait(), "".join(kept)
            except KeyboardInterrupt:
                _end(process)  # it may still write to the folder, which will be removed
                raise
            finally:
                late.cancel()

    @contextmanager
    def beside(self, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """Run `deploy …` until the block ends, for commands such as `deploy tunnel`."""
        self.console.step("run", f"deploy {' '.join(arguments)} &")
        with self._start(arguments) as process:
            try:
                yield process
            finally:
                _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(timeout=30)
    finally:
        process.kill()


def layout(count: int) -> tuple[int, int]:
    """tp and pp for this number of nodes with one GPU, such as tp 5 and pp 2 for ten nodes."""
    tp = max(divisor for divisor in range(1, LARGEST_TP + 1) if count % divisor == 0)
    return tp, count // tp


@contextmanager
def rehearsal(
    count: int, home: Path, settings: SharedSettings, console: Console, *, share_size: str | None = None
) -> Iterator[Rehearsal]:
    """Run nodes, index and Hub within the block, with a folder that has ips.txt. They also end with this process.

    `share_size`: as in `open_rig`.

    Raises:
        HostError, FetchError: something is missing on this machine or on PyPI.
    """
    check_machine()
    begin = time.monotonic()
    wheels = source.prepare(home, console)
    _fetch_uv(settings)
    console.step("index", f"{wheels.count} wheels ready in {time.monotonic() - begin:.1f} s")
    with run_folder(home) as folder, ExitStack() as stack:
        begin = time.monotonic()
        room = stack.enter_context(open_rig(folder, count=count, share_size=share_size))
        console.step(
            "nodes",
            f"{count} nodes with sshd and {MOUNT} are ready after {time.monotonic() - begin:.1f} s: "
            f"{room.ips.read_text().split()}",
        )
        root, port = str(source.private(home, wheels, folder / "index").root), str(INDEX_PORT)
        serve = [sys.executable, "-m", "index", "--root", root, "--json", "serve", "--host", GATEWAY, "--port", port]
        index = stack.enter_context(source.listening(room.command(serve)))
        hub = [sys.executable, "-m", "deploy.rehearsal.hub", "--host", GATEWAY, "--port", str(HUB_PORT), "--repo", REPO]
        endpoint = stack.enter_context(source.listening(room.command(hub)))
        console.step("servers", f"index {index}{wheels.path()}, Hub {endpoint} with {REPO}")
        place = folder / "deployment"
        place.mkdir()
        (place / "ips.txt").write_text(room.ips.read_text())
        (place / "requirements.lock").write_text(wheels.lock)
        yield Rehearsal(
            room=room, folder=place, console=console, index=f"{index}{wheels.path()}", environ={"HF_ENDPOINT": endpoint}
        )


def _fetch_uv(settings: SharedSettings) -> None:
    """Fetch uv for the nodes while PyPI can be reached."""
    pinned = json.loads((resources.files("deploy") / "data" / "uv.json").read_text())
    wheel = pinned["wheels"][os.uname().machine]
    uv.fetch_uv(pinned["version"], wheel["tag"], wheel["sha256"], settings)


@contextmanager
def run_folder(home: Path) -> Iterator[Path]:
    """A folder for one rehearsal. Folders of killed rehearsals are removed; their processes have ended with them."""
    runs = home / "rehearsal" / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    for left in runs.glob("*.lock"):
        with left.open("a") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # a running rehearsal
            remove_tree(left.with_suffix(""))
            left.unlink(missing_ok=True)
    folder = runs / secrets.token_hex(4)
    with folder.with_suffix(".lock").open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        folder.mkdir()
        try:
            yield folder
        finally:
            remove_tree(folder)
            folder.with_suffix(".lock").unlink(missing_ok=True)


def configure(rehearsal: Rehearsal) -> None:
    """Edit the deploy.toml that `deploy init` wrote, as a user would."""
    path = rehearsal.folder / "deploy.toml"
    tp, pp = layout(len(rehearsal.room.nodes))
    text = path.read_text()
    changes = {
        f'name = "{template.name_of(REPO)}"': 'name = "rehearsal"',
        f'engine = "{template.ENGINE}"': 'engine = "aphrodite"',
        # The nodes have the architecture of this machine.
        template.set_lines(template.SETS.get(platform.machine(), template.SET)): 'set = "rehearsal"\n'
        f'index = "{rehearsal.index}"    # the index of the rehearsal\nlock = "requirements.lock"\npython = "system"',
    }
    more = f"[layout]\ntensor_parallel = {tp}\npipeline_parallel = {pp}\n\n[options]\nrehearsal = true\n"
    for old, new in changes.items():
        if old not in text:
            raise NodeError(
                f"deploy init did not write {old!r}",
                remedy="report this defect: deploy/nodes/template.py and deploy/rehearsal/walkthrough.py must agree",
            )
        text = text.replace(old, new)
    path.write_text(f"{text}\n{more}")
    rehearsal.console.step("edit", f"deploy.toml: engine, index, lock, tp {tp} pp {pp}, rehearsal = true")


def start(rehearsal: Rehearsal) -> None:
    """Run `deploy init` and edit deploy.toml."""
    access = ("--user", USER, "--key", str(rehearsal.room.key))
    rehearsal.command("init", "ips.txt", *access, "--share", MOUNT, "--model", REPO, "--accept")
    configure(rehearsal)
    rehearsal.command("plan", "--commands")


def tunnelled(process: subprocess.Popen[str]) -> str:
    """The URL that `deploy tunnel` prints. Raises EngineError with its last line."""
    assert process.stdout
    last = ""
    for line in process.stdout:
        last = line.strip() or last
        address = re.search(r"http://(127\.0\.0\.1|localhost):\d+", line)
        if address:
            return address[0]
    raise EngineError(f"deploy tunnel: {last}")


def ask(rehearsal: Rehearsal, url: str, key: str, *, tokens: int = 32, on_text: Callable[[str], None]) -> int:
    """Request one streamed answer. Return the number of tokens that the engine counted.

    Raises:
        EngineError: there is no answer, or it is not complete.
    """
    prompt = Prompt(model=REPO, text=PROMPT, max_tokens=tokens, api="chat")
    with rehearsal.room.inside():
        answer = asyncio.run(query(CompletionServer(url=url, key=key), prompt, patience=60, on_text=on_text))
    if not answer.tokens:
        raise EngineError(f"{url}: the stream ended without the number of tokens")
    return answer.tokens


def left(rehearsal: Rehearsal) -> dict[str, list[str]]:
    """Processes on the nodes other than sshd, found without SSH."""
    running = {}
    for node in rehearsal.room.nodes:
        others = [
            " ".join(process["argv"])[:80]
            for process in node.processes()
            if process["argv"] and not process["argv"][0].startswith("sshd")
        ]
        if others:
            running[node.name] = others
    return running


def nothing_left(rehearsal: Rehearsal) -> None:
    """Raise NodeError if `deploy down` left processes running."""
    running = left(rehearsal)
    if running:
        node, others = next(iter(running.items()))
        raise NodeError(
            f"after `deploy down`, {sum(map(len, running.values()))} processes are still running, for example {others[0]} on "
            f"{node}"
        )
