"""Shared code for the rehearsal's nodes: an environment with Ray and the simulated engine, small models, a Ray cluster."""

from __future__ import annotations

import asyncio
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

from deploy.fleet.commands import command_line
from deploy.fleet.results import CommandResult
from deploy.fleet.ssh import Fleet
from deploy.nodes.deployment import Node
from deploy.rehearsal import standin
from deploy.rehearsal.hub import safetensors
from deploy.rehearsal.rig import MOUNT, USER, Rig, RigNode
from tests.deploy import nodefaults

LOCK = Path(standin.__file__).parent.parent / "data" / "rehearsal.lock"


def inventory(room: Rig) -> list[Node]:
    """The nodes as objects of the product."""
    return [Node(name=node.name, rank=node.rank, address=node.address, user=USER, key=room.key) for node in room.nodes]


def run(
    room: Rig,
    command: Sequence[str] | str,
    *,
    names: Sequence[str] | None = None,
    timeout: float = 20,
    env: Mapping[str, str] | None = None,
) -> dict[str, CommandResult]:
    """Run a command with variables on nodes, with the product's SSH code."""
    exports = "".join(f"export {name}={shlex.quote(value)}; " for name, value in (env or {}).items())

    async def go() -> dict[str, CommandResult]:
        async with Fleet(inventory(room), known_hosts=room.known_hosts, config=[], connect_timeout=3) as fleet:
            return await fleet.run(exports + command_line(command), nodes=names, timeout=timeout)

    with room.inside():
        return asyncio.run(go())


def said(results: dict[str, CommandResult]) -> dict[str, str]:
    """The stdout of each node's command. All commands must have succeeded."""
    bad = {name: (result.returncode, result.stderr, result.error) for name, result in results.items() if not result.ok}
    assert not bad, bad
    return {name: result.stdout.strip() for name, result in results.items()}


def install(folder: Path) -> Path:
    """Create an environment with the committed lock and the simulated engine's wheel. uv caches its downloads."""
    wheel = standin.build(folder.parent)
    lock = folder.with_suffix(".lock")
    lock.write_text(LOCK.read_text() + f"{wheel.path} --hash=sha256:{wheel.sha256}\n")
    uv = [sys.executable, "-m", "uv"]
    subprocess.run(
        [*uv, "venv", "--quiet", "--relocatable", "--no-project", "--python", "/usr/bin/python3.11", str(folder)], check=True
    )
    subprocess.run(
        [*uv, "pip", "install", "--quiet", "--python", str(folder / "bin" / "python"), "--require-hashes", "-r", str(lock)],
        check=True,
    )
    return folder


def small_model(folder: Path, *, shards: int = 3, layers: int = 6, **config: object) -> Path:
    """Write a model like Llama: config.json, an index, and safetensors. Their headers have the sha256 of the numbers."""
    folder.mkdir(parents=True)
    shape = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 208,
        "max_position_embeddings": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
        "vocab_size": 1000,
        **config,
    }
    (folder / "config.json").write_text(json.dumps(shape))
    weight_map = {}
    for number in range(1, shards + 1):
        name = f"model-{number:05}-of-{shards:05}.safetensors"
        (folder / name).write_bytes(safetensors(f"layer.{number}", bytes([number]) * 4096))
        weight_map[f"layer.{number}"] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


RAY_ENV = {"RAY_USAGE_STATS_ENABLED": "0"}


@contextmanager
def ray_cluster(room: Rig, env: Mapping[str, Mapping[str, str]], *, gpus: Mapping[str, int] | None = None) -> Iterator[str]:
    """Start real Ray on all nodes, one after the other. Yields the head's address. `env`: variables of each `ray start`."""
    ray = f"{MOUNT}/env/bin/ray"
    said(run(room, [f"{MOUNT}/env/bin/python", "-c", "import ray"], timeout=120))
    head = room.nodes[0]
    try:
        for node in room.nodes:
            place = ["--head", "--port=6379"] if node is head else [f"--address={head.address}:6379"]
            count = (gpus or {}).get(node.name, 1)
            command = [ray, "start", *place, f"--node-ip-address={node.address}", f"--num-gpus={count}", "--temp-dir=/tmp/ray"]
            command = command if node is head else [each for each in command if not each.startswith("--temp-dir")]
            more = {**RAY_ENV, **env.get(node.name, {}), "HOST_IP": node.address}
            said(run(room, command, names=[node.name], timeout=120, env=more))
        yield f"{head.address}:6379"
    finally:
        run(room, [ray, "stop", "--force"], timeout=60)


class Engine:
    """The simulated engine on the head, started as a user would start it."""

    def __init__(self, room: Rig, address: str, arguments: Sequence[str], env: Mapping[str, str]) -> None:
        self.node: RigNode = room.nodes[0]
        self.room = room
        self.log = self.node.tmp / "engine.log"
        self.log.unlink(missing_ok=True)
        words = " ".join(arguments)
        line = f"setsid {MOUNT}/env/bin/aphrodite run {words} < /dev/null; echo ended $?"
        full = {**RAY_ENV, "RAY_ADDRESS": address, "HOST_IP": self.node.address, **env}
        said(run(room, f"({line}) > /tmp/engine.log 2>&1 &", names=[self.node.name], env=full))

    def text(self) -> str:
        """The log so far."""
        return self.log.read_text() if self.log.exists() else ""

    def wait(self, word: str, seconds: float = 60) -> str:
        """Wait until the log contains a word, or the engine has ended. Return the log."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            text = self.text()
            if word in text or "\nended " in text:
                return text
            time.sleep(0.1)
        status = run(self.room, [f"{MOUNT}/env/bin/ray", "status", "-v"], names=[self.node.name], timeout=30)[self.node.name]
        raise AssertionError(f"the log has no {word!r} after {seconds:g} s:\n{self.text()}\n{status.stdout}{status.stderr}")

    def stop(self) -> None:
        """Send SIGTERM, and wait for the end."""
        for pid in self.pids():
            nodefaults.kill(self.node, pid, "TERM")
        self.wait("\nended ")

    def pids(self) -> list[int]:
        """The pids of the server on the head."""
        program = f"{MOUNT}/env/bin/aphrodite"
        return [
            process["pid"]
            for process in self.node.processes()
            if program in process["argv"] and process["argv"][0] != "setsid"
        ]

    def get(self, path: str, *, key: str | None = None) -> httpx.Response:
        """Send a GET request on the head's loopback, where the engine listens."""
        return self._curl(path, key, None)

    def post(self, path: str, body: dict[str, object], *, key: str | None = None) -> httpx.Response:
        """Send a POST request on the head's loopback."""
        return self._curl(path, key, body)

    def _curl(self, path: str, key: str | None, body: dict[str, object] | None) -> httpx.Response:
        script = (
            "import json, sys, urllib.request, urllib.error\n"
            "url, headers, body = json.load(sys.stdin)\n"
            "data = json.dumps(body).encode() if body is not None else None\n"
            "try:\n    got = urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=30)\n"
            "except urllib.error.HTTPError as error:\n    got = error\n"
            "print(json.dumps([got.status, got.read().decode()]))\n"
        )
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        request = json.dumps([f"http://127.0.0.1:2242{path}", headers, body])
        done = self.node.execute(["python3", "-c", script], input=request)
        if done.returncode:
            raise ConnectionError(done.stderr.strip().splitlines()[-1])
        status, text = json.loads(done.stdout)
        return httpx.Response(status, text=text)
