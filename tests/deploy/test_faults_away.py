"""Downloads that are killed, cut off or out of room, and nodes that go away while something runs: three nodes, k2 a spare.

A Hub in this process counts what each node downloads, and is as slow as a test wants it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from deploy.rehearsal import hub, walkthrough
from deploy.rehearsal.rig import GATEWAY
from deploy.rehearsal.walkthrough import REPO, Rehearsal
from deploy.steps import assignment
from deploy.steps.order import UP
from tests.deploy import faultkit, nodefaults
from tests.deploy.faultkit import begin, deploy, end, kill, steps, until, until_running, well

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(1500)]
SSH, NODE, DISK = 60, 61, 23
SLOW = 15_000.0
"Bytes a second for each node."


@dataclass
class Scene:
    """The rehearsal and its Hub."""

    made: Rehearsal
    served: hub.Hub

    @property
    def root(self) -> Path:
        """Of the share."""
        return self.made.room.share / "gracefarm"

    def downloading(self) -> subprocess.Popen[str]:
        """`deploy up`, a few files of its slow download having come; as if none had ever been brought before."""
        well(self.made, "up")
        shutil.rmtree(self.root / "weights", ignore_errors=True)
        self.served.served.clear()
        self.served.rate = SLOW
        process = begin(self.made, "up")
        until(lambda: self.count() >= 5)
        return process

    def count(self) -> int:
        """Files that were downloaded whole."""
        return sum(map(len, self.served.served.values()))

    def downloaded(self) -> list[str]:
        """Each of them."""
        return sorted(path for paths in self.served.served.values() for path in paths)

    @property
    def wanted(self) -> list[str]:
        """What the deployment must consist of in the end."""
        return sorted(path for path in self.served.files if not assignment.skipped(path, assignment.SKIP))

    def whole(self) -> bool:
        """Every file is there as the Hub has it."""
        (folder,) = (self.root / "weights").glob(f"*/{hub.COMMIT}")
        return all((folder / path).read_bytes() == self.served.files[path] for path in self.wanted)


def fill(path: Path) -> None:
    """Until nothing more goes in."""
    space = os.statvfs(path.parent)
    with path.open("wb", buffering=0) as stream, suppress(OSError):
        os.posix_fallocate(stream.fileno(), 0, space.f_bavail * space.f_frsize - (1 << 20))
        stream.seek(0, os.SEEK_END)
        while stream.write(bytes(1 << 12)):
            pass


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    spare = {"tensor_parallel = 3": "tensor_parallel = 2"}
    with faultkit.ready(3, options="connect_timeout = 2", more=spare, share_size="2g") as made:
        with made.room.inside():
            serving = hub.serving(hub.llama(120, 15_000), host=GATEWAY, repo=REPO, token=faultkit.HF_TOKEN)
            served = serving.__enter__()
        try:
            made.environ = {**made.environ, "HF_ENDPOINT": served.url}
            yield Scene(made=made, served=served)
        finally:
            serving.__exit__(None, None, None)


def test_killed_in_a_download_the_same_command_goes_on_and_nothing_is_fetched_twice(scene: Scene) -> None:
    made = scene.made
    kill(scene.downloading())
    assert steps(made)["weights"]["outcome"] == "running"
    assert set(walkthrough.left(made)) == {"k0", "k1", "k2"}  # it goes on
    assert faultkit.in_arguments(made) == []
    assert faultkit.in_files(made) == []
    process = begin(made, "up")
    wait = "an earlier download is still running (of an earlier command); waiting for it"
    faultkit.heard(process, [f"{name}: {wait}" for name in ("k0", "k1", "k2")])
    scene.served.rate = None
    assert end(process).code == 0
    assert scene.downloaded() == scene.wanted
    assert scene.whole()
    assert walkthrough.left(made) == {}
    assert faultkit.in_files(made) == []


def test_down_ends_what_a_killed_command_left_at_work(scene: Scene) -> None:
    made = scene.made
    kill(scene.downloading())
    output = well(made, "down")
    assert all(f" on {name}" in output.partition("processes stopped: ")[2] for name in ("k0", "k1", "k2"))
    assert walkthrough.left(made) == {}
    assert faultkit.in_files(made) == []
    scene.served.rate = None
    well(made, "up")
    assert scene.whole()


def test_a_node_that_goes_away_in_a_download_leaves_its_files_to_the_others(scene: Scene) -> None:
    made = scene.made
    process = scene.downloading()
    nodefaults.unplug(made.room["k1"])
    scene.served.rate = None
    try:
        done = end(process, 300)
        assert done.code == 0, done.output  # all that was missing is there
        assert "the other nodes download the files of this node" in done.output
        assert "k1 10.77.0.12:22 cannot be reached" in done.output
        assert steps(made)["weights"]["outcome"] == "done"
        assert scene.whole()
    finally:
        nodefaults.plug(made.room["k1"])
    well(made, "up")
    assert set(scene.served.served) <= {"k0", "k1", "k2"}


def test_a_disk_that_fills_up_while_downloading_is_told_and_the_same_command_completes(scene: Scene) -> None:
    made = scene.made
    process = scene.downloading()
    ballast = made.room.share / "ballast"
    fill(ballast)
    try:
        done = end(process, 200)
        assert done.code == DISK, done.output
        assert "no space left on the shared folder while downloading" in done.output
        assert "remedy: free space on the shared folder" in done.output
    finally:
        ballast.unlink()
        scene.served.rate = None
    before = set(scene.downloaded())
    assert before
    well(made, "up")
    assert scene.whole()
    assert walkthrough.left(made) == {}


@pytest.mark.parametrize("step", ["cache", "download"])
def test_a_node_that_goes_away_in_a_step(scene: Scene, step: str) -> None:
    made = scene.made
    well(made, "up")
    if step == "download":
        (made.room.share / "gracefarm" / "rehearsal" / "download").unlink()
    process = begin(made, "up", "--from", "cache")
    until_running(made, step, process)
    nodefaults.unplug(made.room["k1"])
    try:
        done = end(process, 200)
        assert done.code in (SSH, NODE), done.output
        found = steps(made)[step]
        assert found["outcome"] == "failed" or "cut" not in found["text"]  # a cut connection is not a reason to do without
        assert "k1" in done.error
    finally:
        nodefaults.plug(made.room["k1"])
    well(made, "up")
    assert {steps(made)[step]["outcome"] for step in (*UP, "download")} <= {"done", "skipped"}


def test_a_spare_that_is_away_holds_nobody_up(scene: Scene) -> None:
    made = scene.made
    scene.served.rate = None
    well(made, "up")
    nodefaults.unplug(made.room["k2"])
    try:
        output = well(made, "serve", seconds=400)
        assert "k2 10.77.0.13:22 cannot be reached: no answer; this node is a spare and is ignored" in output
        assert "READY" in output
        assert "up to date" in well(made, "up")
    finally:
        nodefaults.plug(made.room["k2"])
    assert "is ignored" not in well(made, "serve", seconds=400)


def test_down_with_a_node_away_ends_everything_on_the_others(scene: Scene) -> None:
    made = scene.made
    well(made, "serve", seconds=400)
    nodefaults.unplug(made.room["k1"])
    try:
        done = deploy(made, "down")
        assert done.code == SSH, done.output
        assert "k1 10.77.0.12:22 cannot be reached" in done.error
        assert " on k0" in done.error.partition("; processes stopped on the other nodes: ")[2]
        assert "repeat `deploy down`, since processes on k1 may still run" in done.error
        assert set(walkthrough.left(made)) == {"k1"}
    finally:
        nodefaults.plug(made.room["k1"])
    assert "no process of this deployment is running" in well(made, "down")
    assert walkthrough.left(made) == {}


def test_an_engines_worker_that_is_killed_after_loading_is_told_by_status(scene: Scene) -> None:
    """Ray and all nodes are alive: it is the engine that is dead, as its next completion finds out."""
    made = scene.made
    well(made, "serve", seconds=400)
    assert nodefaults.kill_matching(made.room["k1"], "RayWorkerWrapper")
    done = deploy(made, "status", "--json")
    found = json.loads(done.output.strip().splitlines()[-1])
    service = found["service"]
    assert (service["word"], service["detail"]) == ("DEAD", "engine"), service
    assert service["text"].startswith("no completion: HTTP 500; all nodes are alive")
    assert "READY" in well(made, "serve", seconds=400)
    well(made, "down")
    assert walkthrough.left(made) == {}
