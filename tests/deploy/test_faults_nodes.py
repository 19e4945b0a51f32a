"""Faults of a node, on three nodes of the rehearsal: the error names the node; after the repair the same command continues."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.rehearsal import walkthrough
from deploy.rehearsal.rig import NodeSpec
from deploy.rehearsal.walkthrough import Rehearsal
from tests.deploy import faultkit, nodefaults
from tests.deploy.faultkit import begin, deploy, end, until_running, verdict, well

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(1500)]
SSH, NODE, PREFLIGHT, ENGINE, INSTALL = 60, 61, 62, 63, 41


@pytest.fixture(scope="module")
def made() -> Iterator[Rehearsal]:
    """Two workers start at once: on few cores one of them may die of Ray's own time-out, and is started again."""
    with faultkit.ready(3, options="connect_timeout = 2\nray_wave = 2") as ready:
        yield ready


def test_two_workers_at_once_come_up(made: Rehearsal) -> None:
    output = well(made, "serve", seconds=400)
    assert "READY" in output
    assert "3/3  k1, k2" in output  # neither waited for the other
    well(made, "down")


def test_another_host_key(made: Rehearsal) -> None:
    nodefaults.new_host_key(made.room["k1"])
    done = deploy(made, "up")
    assert done.code == SSH
    assert "k1 10.77.0.12:22: the host key differs from the pinned key" in done.output
    well(made, "init", "deploy.toml", "--accept", "--repin")
    well(made, "up")


def test_every_check_is_told_and_environments_are_listed_and_imported(made: Rehearsal) -> None:
    well(made, "up")
    table = well(made, "preflight")
    for check in (
        "names",
        "share",
        "route",
        "ports",
        "clock",
        "python",
        "cuda",
        "pages",
        "libstdc++",
        "shm",
        "limits",
        "gloo",
    ):
        assert f"\n{check}" in table
    assert " all " in table
    identifier = faultkit.steps(made)["environment"]["data"]["id"][:12]
    listed = well(made, "env", "list").splitlines()
    assert any(line.startswith(identifier) and line.rstrip().endswith("env") for line in listed)
    rows = well(made, "env", "matrix")
    assert all(f"k{rank}  aphrodite._C: " in rows for rank in range(3))
    assert well(made, "env", "gc").startswith("0 environments removed")


@pytest.mark.parametrize("command", [("up",), ("serve",), ("preflight",), ("run", "--", "true"), ("down",)])
def test_a_node_that_is_away_is_named_at_once(made: Rehearsal, command: tuple[str, ...]) -> None:
    nodefaults.unplug(made.room["k2"])
    try:
        since = time.monotonic()
        done = deploy(made, *command)
        assert time.monotonic() - since < 30
        assert done.code == SSH
        assert "k2 10.77.0.13:22 cannot be reached" in done.output
    finally:
        nodefaults.plug(made.room["k2"])


@pytest.mark.parametrize("step", ["preflight", "environment", "proof"])
def test_a_node_that_goes_away_in_a_step(made: Rehearsal, step: str) -> None:
    process = begin(made, "up", "--from", step)
    until_running(made, step, process)
    nodefaults.unplug(made.room["k2"])
    try:
        done = end(process, 120)
    finally:
        nodefaults.plug(made.room["k2"])
    assert done.code in (SSH, NODE, PREFLIGHT), done.output
    assert "k2" in done.error
    well(made, "up")


def test_a_node_that_goes_away_while_ray_starts(made: Rehearsal) -> None:
    well(made, "up")
    well(made, "down")
    process = begin(made, "serve")
    until_running(made, "ray", process)
    nodefaults.unplug(made.room["k2"])
    try:
        done = end(process, 300)
    finally:
        nodefaults.plug(made.room["k2"])
    assert done.code in (SSH, NODE, ENGINE), done.output
    assert "k2" in done.error
    assert "READY" in well(made, "serve", seconds=400)


def test_a_node_that_goes_away_while_the_engine_loads(made: Rehearsal) -> None:
    well(made, "serve", seconds=400)
    well(made, "down", "--keep-ray")
    faultkit.order(made, "k2", "load=slow:600")
    process = begin(made, "serve")
    until_running(made, "engine", process)
    time.sleep(4)
    made.room["k2"].off()
    try:
        done = end(process, 300)
    finally:
        made.room["k2"].boot()
        faultkit.order(made, "k2", "")
    assert done.code == ENGINE, done.output
    assert "Ray lost k2" in done.error
    assert "READY" in well(made, "serve", seconds=400)


def test_a_worker_that_dies_before_loading_is_started_again(made: Rehearsal) -> None:
    well(made, "serve", seconds=400)
    well(made, "down", "--keep-ray")
    nodefaults.kill(made.room["k1"], faultkit.raylet(made, "k1"))
    assert "READY" in well(made, "serve", seconds=400)


def test_a_worker_that_dies_while_loading_is_told(made: Rehearsal) -> None:
    well(made, "serve", seconds=400)
    well(made, "down", "--keep-ray")
    faultkit.order(made, "k1", "load=slow:600")
    try:
        process = begin(made, "serve")
        faultkit.until(lambda: faultkit.has_worker(made, "k1"), 120)
        time.sleep(4)  # it meets the others and begins to load
        nodefaults.kill(made.room["k1"], faultkit.raylet(made, "k1"))
        done = end(process, 300)
    finally:
        faultkit.order(made, "k1", "")
    assert done.code == ENGINE
    assert "Ray lost k1; a worker died: " in done.output
    found = verdict(made)
    assert (found.kind, found.text) == ("dead-node", "the engine ended after Ray lost k1")
    assert "READY" in well(made, "serve", seconds=400)


def test_out_of_memory_on_one_node_is_the_cause_that_is_told(made: Rehearsal) -> None:
    well(made, "serve", seconds=400)
    well(made, "down", "--keep-ray")
    faultkit.order(made, "k1", "load=oom")
    try:
        done = deploy(made, "serve", seconds=400)
    finally:
        faultkit.order(made, "k1", "")
    assert done.code == ENGINE
    assert "GPU memory ran out" in done.output


def test_a_port_that_is_taken(made: Rehearsal) -> None:
    well(made, "up")
    well(made, "down")
    pid = nodefaults.take_port(made.room["k1"], 8077)
    try:
        done = deploy(made, "up", "--from", "preflight")
        assert done.code == PREFLIGHT
        assert "k1: ports: port 8077 is used by a process of another user" in done.output
        done = deploy(made, "serve", "--skip-up")
        assert done.code == ENGINE
        assert "k1: port 8077 is used by a process of another user, which does not belong to this deployment" in done.output
        left = walkthrough.left(made)
        assert list(left) == ["k1"]
        assert len(left["k1"]) == 1  # the one that has the port
    finally:
        nodefaults.kill(made.room["k1"], pid)
    pid = nodefaults.take_port(made.room["k0"], 2242, "127.0.0.1")
    try:
        done = deploy(made, "serve", seconds=400)
        assert done.code == ENGINE
        assert "k0: port 2242 is used by a process of another user" in done.output
    finally:
        nodefaults.kill(made.room["k0"], pid)
    assert "READY" in well(made, "serve", seconds=400)
    well(made, "down")


def test_a_shard_that_rotted_or_was_cut_short_is_brought_again(made: Rehearsal) -> None:
    well(made, "up")
    folder = next((made.room.share / "gracefarm" / "weights").glob("*/*[!g]"))
    rotten, short = (next(folder.glob(f"model-0000{number}-*")) for number in (1, 2))
    content = bytearray(rotten.read_bytes())
    content[-1] ^= 1
    rotten.write_bytes(content)
    done = deploy(made, "weights", "verify", "--remove")
    assert done.code == INSTALL
    assert rotten.name in done.output
    assert "downloaded now" in well(made, "up")
    short.write_bytes(short.read_bytes()[:100])
    output = well(made, "up", "--skip", "proof")
    assert f"missing or of a different size: {short.name}" in output
    assert "all files match the Hub's digests" in well(made, "weights", "verify")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (nodefaults.SHARELESS, "k1: share: "),
        (nodefaults.LOOPBACK, "k1: names: node-10-77-0-12 resolves to 127.0.1.1"),
        (nodefaults.WRONG_PYTHON, "k1: python: "),
    ],
)
def test_a_node_of_another_kind_is_told_by_preflight(made: Rehearsal, spec: NodeSpec, words: str) -> None:
    well(made, "up")
    made.room["k1"].off()
    made.room["k1"].boot(spec)
    try:
        done = deploy(made, "up", "--from", "preflight")
        assert done.code == PREFLIGHT, done.output
        assert words in done.output
        assert "remedy:" in done.output
    finally:
        made.room["k1"].off()
        made.room["k1"].boot(NodeSpec())
    well(made, "up")


def test_a_share_that_goes_away_is_noticed_without_being_asked(made: Rehearsal) -> None:
    well(made, "up")
    nodefaults.lose_share(made.room["k2"])
    try:
        done = deploy(made, "up")
        assert done.code == PREFLIGHT
        assert "/mnt/share is not mounted on k2" in done.output
    finally:
        made.room["k2"].off()
        made.room["k2"].boot()
    well(made, "up")


def test_a_rolled_back_environment_stays_active_until_somebody_goes_forward(made: Rehearsal) -> None:
    well(made, "up")
    lock = made.folder / "requirements.lock"
    before = lock.read_text()
    first = faultkit.steps(made)["environment"]["data"]["id"]
    lines = before.split("\n")
    at = next(index for index, line in enumerate(lines) if line.startswith(("py-spy==", "pyasn1-modules==")))
    lock.write_text("\n".join([*lines[:at], *lines[at + 2 :]]))
    try:
        assert "built now" in well(made, "up", seconds=400)
        second = faultkit.steps(made)["environment"]["data"]["id"]
        assert second != first
        well(made, "env", "rollback")
        assert f"{first[:12]} is active after a rollback" in well(made, "up")
        assert f"{second[:12]} is active" in well(made, "env", "up")
    finally:
        lock.write_text(before)
    well(made, "up")
    assert faultkit.steps(made)["environment"]["data"]["id"] == first


def serving(made: Rehearsal) -> dict[str, list[int]]:
    """Process ids of each node's raylet, and of the engine on the head."""
    found = {
        node.name: [each["pid"] for each in node.processes() if each["argv"] and each["argv"][0].endswith("/raylet/raylet")]
        for node in made.room.nodes
    }
    marks = [(each["pid"], each["environ"].get("GRACEFARM_MARK", "")) for each in made.room.nodes[0].processes()]
    return {**found, "engine": sorted(pid for pid, mark in marks if mark.endswith("/engine"))[:1]}


def test_another_environment_starts_ray_and_the_engine_anew(made: Rehearsal) -> None:
    """By a new lock and by a roll-back; the plan is the same, for it names the environment by a link."""
    well(made, "serve", seconds=400)
    first = serving(made)
    assert all(first.values())
    lock = made.folder / "requirements.lock"
    before = lock.read_text()
    lines = before.split("\n")
    at = next(index for index, line in enumerate(lines) if line.startswith("pyasn1-modules=="))
    lock.write_text("\n".join([*lines[:at], *lines[at + 2 :]]))
    try:
        plan = (made.folder / ".deploy" / "plan.json").read_text()
        said = well(made, "serve", seconds=400)
        assert "different plan or environment" in said
        assert (made.folder / ".deploy" / "plan.json").read_text() == plan
        second = serving(made)
        assert all(second[name] and second[name] != first[name] for name in first), (first, second)
        well(made, "env", "rollback")
        well(made, "serve", seconds=400)
        third = serving(made)
        assert all(third[name] and third[name] != second[name] for name in first), (second, third)
        assert "nothing to do" in well(made, "serve")
        assert serving(made) == third
    finally:
        lock.write_text(before)
        well(made, "env", "up")
        well(made, "down")


def test_nothing_of_all_this_is_left(made: Rehearsal) -> None:
    well(made, "down")
    assert walkthrough.left(made) == {}
    assert faultkit.in_files(made) == []
    assert Path(made.folder / ".deploy" / "state.json").stat().st_size > 0
