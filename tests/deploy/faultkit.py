"""Shared code of the tests of faults: a prepared rehearsal, commands that may fail or be killed, and the canary."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from deploy.fleet.shells import remote_nodes
from deploy.fleet.ssh import open_fleet
from deploy.nodes import state
from deploy.nodes.deployment import load_deployment
from deploy.nodes.facts import load_facts
from deploy.planning.plans import ServePlan
from deploy.rehearsal import walkthrough
from deploy.rehearsal.walkthrough import Rehearsal
from deploy.steps import engine, ray
from deploy.watch.verdict import Diagnosis, diagnose, probe
from gracefarm import settings
from gracefarm.console import Console

HF_TOKEN = "hf_" + "planted" * 5


@dataclass(frozen=True)
class Done:
    """A finished command."""

    code: int
    output: str

    @property
    def error(self) -> str:
        """The last error with its remedy. Only this part is tested, since other lines may also contain the name of a node."""
        # The error is at the start of a line. gRPC prints "RPC error: " inside of a line.
        _before, found, said = f"\n{self.output}".rpartition("\nerror: ")
        assert found, self.output
        return said


@contextmanager
def ready(
    count: int, *, options: str = "", more: Mapping[str, str] | None = None, share_size: str | None = None
) -> Iterator[Rehearsal]:
    """A rehearsal after `init` and `plan`. `options` are lines for [options] of deploy.toml; `more` are replacements in it."""
    here = settings.load()
    with walkthrough.rehearsal(count, here.home, here, Console(), share_size=share_size) as made:
        made.environ = {**made.environ, "HF_TOKEN": HF_TOKEN}
        walkthrough.start(made)
        path = made.folder / "deploy.toml"
        text = path.read_text().replace("rehearsal = true", f"rehearsal = true\n{options}")
        for old, new in (more or {}).items():
            assert old in text
            text = text.replace(old, new)
        path.write_text(text)
        yield made


def begin(made: Rehearsal, *arguments: str) -> subprocess.Popen[str]:
    """Start `deploy …` in the network of the nodes."""
    argv = ["env", "--chdir", str(made.folder), sys.executable, "-m", "deploy", *arguments]
    return subprocess.Popen(
        made.room.command(argv),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **made.environ},
    )


def end(process: subprocess.Popen[str], seconds: float = 240) -> Done:
    """Wait for the end of a command."""
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        kill(process)
        raise AssertionError(f"the command did not end after {seconds} s") from None
    sys.stdout.write(output)
    return Done(process.returncode, output)


def heard(process: subprocess.Popen[str], words: Collection[str], seconds: float = 120) -> str:
    """Wait until the output of a command contains all words. Return this output. `end` returns the rest."""
    assert process.stdout
    text, deadline = b"", time.monotonic() + seconds
    while not all(word.encode() in text for word in words):
        ready, _, _ = select.select([process.stdout], [], [], max(0, deadline - time.monotonic()))
        block = os.read(process.stdout.fileno(), 1 << 16) if ready else b""
        assert block, text.decode(errors="replace")
        text += block
    sys.stdout.write(text.decode(errors="replace"))
    return text.decode(errors="replace")


def deploy(made: Rehearsal, *arguments: str, seconds: float = 240) -> Done:
    """Run `deploy …` to its end. It may fail."""
    return end(begin(made, *arguments), seconds)


def well(made: Rehearsal, *arguments: str, seconds: float = 240) -> str:
    """Run `deploy …`, which must succeed. Return its output."""
    done = deploy(made, *arguments, seconds=seconds)
    assert done.code == 0, done.output
    return done.output


def kill(process: subprocess.Popen[str]) -> None:
    """Kill the command with SIGKILL, but not the process that started it. The command has ended when this returns."""
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.send_signal(signal.SIGKILL)
    process.wait(timeout=20)
    if process.stdout:
        process.stdout.close()


def interrupt(process: subprocess.Popen[str]) -> None:
    """Send SIGINT to the command, as a terminal does for Ctrl-C."""
    for child in psutil.Process(process.pid).children(recursive=True):
        if "deploy" in child.cmdline():
            child.send_signal(signal.SIGINT)


def steps(made: Rehearsal) -> dict[str, Any]:
    """The steps in the state on disk."""
    return state.read(load_deployment(made.folder / "deploy.toml").folder).model_dump()["steps"]


def until(said: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until a condition is true."""
    deadline = time.monotonic() + seconds
    while not said():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def until_running(made: Rehearsal, step: str, process: subprocess.Popen[str], seconds: float = 120) -> None:
    """Wait until a step is running, according to the state."""
    since, deadline = time.time() - 0.5, time.monotonic() + seconds
    while True:
        found = steps(made).get(step, {})
        if found.get("outcome") == "running" and found["begun"] > since - seconds and _newer(found, process):
            return
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"{step} has not begun"
        time.sleep(0.02)


def _newer(found: Mapping[str, Any], process: subprocess.Popen[str]) -> bool:
    return bool(found["begun"] >= psutil.Process(process.pid).create_time() - 1)


def verdict(made: Rehearsal, seconds: float = 5) -> Diagnosis:
    """The diagnosis of the canary."""
    deployment = load_deployment(made.folder / "deploy.toml")

    async def go() -> Diagnosis:
        async with open_fleet(deployment) as nodes:
            plan = ServePlan.model_validate_json((deployment.folder.path / "plan.json").read_text())
            head = remote_nodes(nodes, load_facts(deployment))[0]
            spec = engine.spec_of(deployment, plan, ray.spec_of(deployment, plan), head, {})
            return diagnose(await probe(nodes, head, spec, seconds=seconds))

    with made.room.inside():
        return asyncio.run(go())


def health(made: Rehearsal) -> int:
    """The HTTP status of the engine's /health, requested on the head."""
    code = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:2242/health', timeout=5).status)"
    return int(made.room.nodes[0].execute(["python3", "-c", code]).stdout)


def order(made: Rehearsal, node: str, text: str) -> None:
    """Order a fault of the simulated engine on a node, from now on. An empty text ends the fault."""
    (made.room[node].home / ".gracefarm-standin").write_text(text)


def raylet(made: Rehearsal, node: str) -> int:
    """The pid of a node's raylet, as processes of the node see it."""
    return next(
        process["pid"]
        for process in made.room[node].processes()
        if process["argv"] and process["argv"][0].endswith("raylet/raylet")
    )


def has_worker(made: Rehearsal, node: str) -> bool:
    """Whether Ray runs a worker of the simulated engine on a node."""
    return any("RayWorkerWrapper" in process["argv"][0] for process in made.room[node].processes())


def engine_pid(made: Rehearsal) -> int:
    """The pid of the simulated engine on the head."""
    found = [process for process in made.room.nodes[0].processes() if len(process["argv"]) > 1]
    return next(process["pid"] for process in found if process["argv"][1].endswith("bin/aphrodite"))


def secrets(made: Rehearsal) -> list[bytes]:
    """All secrets that this deployment has now."""
    found = [HF_TOKEN]
    for name in ("api-key", "ray-token"):
        with suppress(FileNotFoundError):
            found.append((made.folder / ".deploy" / name).read_text().strip())
    return [secret.encode() for secret in found]


def in_arguments(made: Rehearsal) -> list[str]:
    """Argument lists with a secret, from all processes of this machine, which include the processes of the nodes."""
    found = []
    wanted = secrets(made)
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = path.read_bytes()
            found += [str(words) for secret in wanted if secret in words]
    return found


ALLOWED = ("api-key", "ray-token")


def in_files(made: Rehearsal) -> list[str]:
    """Files with a secret, except for the files in which secrets are stored.

    They are files of the deployment, of the share and of every node, including its file systems in memory.
    """
    wanted = secrets(made)
    folders = [made.folder, made.room.share, *(node.tmp for node in made.room.nodes), *(node.home for node in made.room.nodes)]
    found = []
    for folder in folders:
        for path in folder.rglob("*"):
            if path.name in ALLOWED or path.is_symlink() or not path.is_file() or "/site-packages/" in str(path):
                continue
            with suppress(OSError):
                content = path.read_bytes()
                found += [str(path) for secret in wanted if secret in content]
    text = "".join(f"{secret.decode()}\n" for secret in wanted)
    for node in made.room.nodes:
        look = ["grep", "-rlaF", "-D", "skip", "--exclude-dir=rig*", "-f", "-", "/dev/shm", "/run"]
        done = node.execute(look, input=text)
        assert "shm" not in done.stderr
        found += [f"{node.name}:{path}" for path in done.stdout.splitlines()]
    return found


def dump(value: object) -> str:
    """A value as text for messages."""
    return json.dumps(value, indent=1, default=str)
