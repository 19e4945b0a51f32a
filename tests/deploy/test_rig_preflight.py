"""Faults of nodes that preflight names before anything is started: real sshd, a real switch, no Ray."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deploy.rehearsal.rig import MOUNT, USER, Rig, RigNode, open_rig
from gracefarm.errors import ExitCode
from tests.deploy import nodefaults

pytestmark = [pytest.mark.root, pytest.mark.timeout(300)]


def deploy(room: Rig, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`deploy …` where the nodes can be reached."""
    argv = ["env", "--chdir", str(folder), sys.executable, "-m", "deploy", *words]
    return subprocess.run(room.command(argv), capture_output=True, text=True, timeout=120, env=dict(os.environ), check=False)


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Rig]:
    with open_rig(tmp_path / "r", count=2) as made:
        folder = tmp_path / "d"
        folder.mkdir()
        hosts = ", ".join(f'"{node.address}"' for node in made.nodes)
        (folder / "deploy.toml").write_text(
            f'share = "{MOUNT}"\n[nodes]\nhosts = [{hosts}]\nuser = "{USER}"\nkey = "{made.key}"\n'
            "[options]\nrehearsal = true\nconnect_timeout = 3\n"
        )
        done = deploy(made, folder, "init", "deploy.toml", "--accept")
        assert done.returncode == 0, done.stderr
        yield made


@pytest.mark.parametrize(
    ("node", "fault", "words"),
    [
        pytest.param("k1", nodefaults.fill_disk, "k1: disk: no space left on /tmp", marks=pytest.mark.slow),
        pytest.param(
            *("k1", nodefaults.read_only_share, f"k1: share: {MOUNT} cannot be written: read-only file system"),
            marks=pytest.mark.slow,
        ),
        ("k0", nodefaults.forbid_forwarding, "k0: tunnel: k0: sshd forbids forwarding port 2242"),
    ],
)
def test_the_node_and_the_cause_are_the_error(
    room: Rig, tmp_path: Path, node: str, fault: Callable[[RigNode], None], words: str
) -> None:
    fault(room[node])
    done = deploy(room, tmp_path / "d", "preflight")
    assert done.returncode == ExitCode.PREFLIGHT, done.stdout + done.stderr
    assert f"error: {words}" in done.stderr
    assert "more failed" not in done.stderr


def test_frames_that_the_switch_drops_are_told_on_both_ends(room: Rig, tmp_path: Path) -> None:
    for node in room.nodes:
        nodefaults.jumbo(node)
    done = deploy(room, tmp_path / "d", "preflight")
    assert done.returncode == ExitCode.PREFLIGHT, done.stdout + done.stderr
    assert "error: k0: route: 64 KiB to k1 (10.77.0.12) do not arrive, but small packets arrive" in done.stderr
    assert "the interface of this node has mtu 9000" in " ".join(done.stderr.split())
    assert "1 more failed" in done.stderr
