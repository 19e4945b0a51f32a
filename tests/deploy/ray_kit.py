"""Shared code of the tests of Ray and of the engine: an environment with Ray on the rig's share, and plans for its nodes."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from deploy.fleet.probe import probe_nodes
from deploy.fleet.shells import remote_nodes
from deploy.fleet.ssh import open_fleet
from deploy.nodes import paths
from deploy.nodes.deployment import Deployment, load_deployment
from deploy.nodes.facts import Facts, keep_facts
from deploy.planning import models, plans
from deploy.planning.plans import ServePlan
from deploy.rehearsal.rig import MOUNT, USER, Rig
from gracefarm import settings
from gracefarm.files import atomic_directory, lock

RAY = "ray[default]==2.60.0"
TOKEN = "c0ffee" * 8
COMMIT = "ab" * 20
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "intermediate_size": 128,
    "vocab_size": 256,
    "max_position_embeddings": 2048,
}


def ray_environment(wanted: Sequence[str] = (RAY,), name: str = f"ray-{RAY.rpartition('=')[2]}") -> Path:
    """A relocatable environment with the nodes' Python and Ray, from the configured index. It is made once on this machine."""
    folder = settings.load().home / "tests" / name
    uv = Path(sys.executable).with_name("uv")
    with lock(folder.with_name(folder.name + ".lock")):
        if not folder.is_dir():
            index = settings.load().index_url
            with atomic_directory(folder) as made:
                python = made / "bin" / "python"
                options = ["--relocatable", "--no-project", "--python", "/usr/bin/python3", "--allow-existing"]
                subprocess.run([uv, "venv", "-q", *options, made], check=True)
                where = ["--default-index", index] if index else []
                subprocess.run(
                    [uv, "pip", "install", "-q", "--python", python, "--compile-bytecode", *where, *wanted], check=True
                )
    return folder


def bring_ray(room: Rig, source: Path | None = None) -> None:
    """Copy the environment to the share, with hard links if they are possible."""
    source = source or ray_environment()
    target = room.folder / "share" / "rayenv"
    if subprocess.run(["cp", "-al", source, target], check=False, capture_output=True).returncode:
        shutil.rmtree(target, ignore_errors=True)
        subprocess.run(["cp", "-a", source, target], check=True)


def deployment(
    room: Rig, folder: Path, *, layout: tuple[int, int] = (1, 2), env: Mapping[str, str] | None = None
) -> Deployment:
    """Write deploy.toml for the rig's nodes in `folder`, like `deploy init`. The environment with Ray is active."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    lines = [
        'name = "t"',
        f'share = "{MOUNT}"',
        "[nodes]",
        f"hosts = {json.dumps([node.address for node in room.nodes])}",
        f'user = "{USER}"',
        f'key = "{room.key}"',
        "[model]",
        'repo = "org/model"',
        f'revision = "{COMMIT}"',
        'config = "config.json"',
        "[layout]",
        f"tensor_parallel = {layout[0]}",
        f"pipeline_parallel = {layout[1]}",
        "[options]",
        "rehearsal = true",
        "[env]",
        *(f"{name} = {json.dumps(value)}" for name, value in (env or {}).items()),
    ]
    (folder / "deploy.toml").write_text("\n".join(lines) + "\n")
    made = load_deployment(folder / "deploy.toml")
    made.folder.make()
    shutil.copy(room.known_hosts, made.folder.known_hosts)
    link = room.folder / "share" / Path(paths.environment(made)).relative_to(MOUNT)
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink():
        link.symlink_to(f"{MOUNT}/rayenv")
    return made


def planned(room: Rig, made: Deployment) -> ServePlan:
    """The plan that `deploy plan` makes, from the current facts of the nodes."""

    async def go() -> Facts:
        async with open_fleet(made, config=[]) as fleet:
            found, bad = await probe_nodes(made, remote_nodes(fleet))
            assert not bad, bad
            return keep_facts(made, found)

    with room.inside():
        facts = asyncio.run(go())
    return plans.make(made, facts, models.find(made.data.model, made.path.parent)[0])
