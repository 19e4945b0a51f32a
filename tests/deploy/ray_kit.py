"""What the tests of Ray and of the engine share: an environment with Ray on the rig's share, and plans for its nodes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from deploy.inventory import Node
from deploy.layout import Layout
from deploy.plan import NodePlan, Plan, identified
from deploy.rehearsal.nodes import MOUNT, USER, Rig
from gracefarm import settings
from gracefarm.files import atomic_directory, lock

RAY = "ray[default]==2.60.0"
PYTHON = f"{MOUNT}/rayenv/bin/python"
TOKEN = "c0ffee" * 8
BASE = f"/tmp/gracefarm-{USER}"


def ray_environment() -> Path:
    """A relocatable environment of the nodes' Python with Ray, made once on this machine; from the index pip is told of."""
    folder = settings.load().home / "tests" / f"ray-{RAY.rpartition('=')[2]}"
    uv = Path(sys.executable).with_name("uv")
    with lock(folder.with_name(folder.name + ".lock")):
        if not folder.is_dir():
            index = settings.load().index_url
            with atomic_directory(folder) as made:
                python = made / "bin" / "python"
                options = ["--relocatable", "--no-project", "--python", "/usr/bin/python3", "--allow-existing"]
                subprocess.run([uv, "venv", "-q", *options, made], check=True)
                where = ["--default-index", index] if index else []
                subprocess.run([uv, "pip", "install", "-q", "--python", python, "--compile-bytecode", *where, RAY], check=True)
    return folder


def bring_ray(room: Rig) -> None:
    """Onto the share, as hard links where that is possible."""
    source = ray_environment()
    target = room.folder / "share" / "rayenv"
    if subprocess.run(["cp", "-al", source, target], check=False, capture_output=True).returncode:
        shutil.rmtree(target, ignore_errors=True)
        subprocess.run(["cp", "-a", source, target], check=True)


def inventory(room: Rig) -> list[Node]:
    return [Node(name=one.name, rank=one.rank, address=one.address, user=USER, key=room.key) for one in room.nodes]


def temp(mark: str) -> str:
    return f"{BASE}/{mark[:8]}"


def plan(
    room: Rig, count: int, mark: str, *, serve: tuple[str, ...] = ("true",), env: Mapping[str, str] | None = None
) -> Plan:
    """The first `count` nodes, one GPU each, as deploy.plan would have them."""
    head = room.nodes[0].address
    nodes = []
    for one in room.nodes[:count]:
        where = (
            ("--head", "--port=6379", f"--temp-dir={temp(mark)}", "--include-dashboard=false")
            if one is room.nodes[0]
            else (f"--address={head}:6379",)
        )
        arguments = (f"--node-ip-address={one.address}", "--num-gpus=1", "--num-cpus=2", "--disable-usage-stats")
        arguments += ("--object-manager-port=8076", "--node-manager-port=8077", "--dashboard-agent-listen-port=52365")
        arguments += ("--min-worker-port=20000", "--max-worker-port=20099", "--object-store-memory=100000000")
        nodes.append(
            NodePlan(
                name=one.name,
                address=one.address,
                private=one.address,
                interface="eth0",
                gpus=1,
                env={
                    "RAY_AUTH_MODE": "token",
                    "RAY_AUTH_TOKEN_PATH": f"{BASE}/{mark}/{one.name}/ray-token",
                    "HOST_IP": one.address,
                    **(env or {}),
                },
                ray=(f"{MOUNT}/rayenv/bin/ray", "start", *where, *arguments),
            )
        )
    layout = Layout(
        tp=1,
        pp=count,
        partition=(1,) * count,
        max_model_len=128,
        max_num_seqs=4,
        max_num_batched_tokens=128,
        gmu=0.9,
    )
    return identified(
        Plan(
            deployment="test",
            engine="aphrodite",
            model="org/model",
            revision="0" * 40,
            layout=layout,
            nodes=tuple(nodes),
            spares=tuple(one.name for one in room.nodes[count:]),
            serve=serve,
            serve_env={"RAY_ADDRESS": f"{head}:6379", **nodes[0].env},
            secret_env=("APHRODITE_API_KEY",),
        )
    )
