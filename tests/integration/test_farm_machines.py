"""`builder build --farm` on real raylets, each on a machine of its namespaces: what a network and a power cut do to a run."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from builder.planning.settings import load
from tests import projects
from tests.conftest import REPOSITORY, Farm, new_farm
from tests.integration.farm_kit import Machine, Room, open_room
from tests.integration.test_farm import NATIVE

pytestmark = [pytest.mark.slow, pytest.mark.root, pytest.mark.timeout(1800)]
COUNT = """
import time, ray
ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
while True:
    print("alive", sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in ray.nodes()), flush=True)
    time.sleep(1)
"""
PAUSE = "import time\ntime.sleep({seconds})\nreturn wheel(wheel_directory, name='{name}')"


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A head that builds nothing, and a machine outside that asks."""

    farm: Farm
    room: Room
    head: Machine
    laptop: Machine

    @property
    def address(self) -> str:
        return f"ray://{self.head.address}:10001"

    def recipe(self, name: str, seconds: float) -> None:
        self.farm.recipe(name, projects.backend(PAUSE.format(seconds=seconds, name=name)))

    def command(self, *names: str, target: str = NATIVE) -> list[str]:
        return [sys.executable, "-m", "builder", "build", *names, "--matrix", f"target={target}", "--farm", self.address]


@pytest.fixture(scope="module")
def cluster(shared_home: Path) -> Iterator[Cluster]:
    with new_farm(shared_home) as farm:
        # The machines of the room reach no mirror: what each build needs lies in the shared folders after one.
        farm.recipe("first", projects.backend(PAUSE.format(seconds=0, name="first")))
        first = farm.run("build", "first", "--target", NATIVE)
        assert first.code == 0, first.said
        yield from _cluster(farm)


def _cluster(farm: Farm) -> Iterator[Cluster]:
    with open_room(farm) as room:
        head = room.head()
        head.start([sys.executable, "-c", COUNT])
        yield Cluster(farm=farm, room=room, head=head, laptop=room.machine("laptop"))


@pytest.fixture
def workers(cluster: Cluster) -> Iterator[list[Machine]]:
    """Those that a test adds; they are switched off after it."""
    added: list[Machine] = []
    yield added
    for machine in added:
        if machine.holder.poll() is None:
            machine.power_off()
    wait_for_workers(cluster, 0)  # Ray notices it after half a minute


def until(machine: Machine, number: int, words: str, patience: float = 240) -> str:
    """Wait until the command that was started as that number says this; all that it has said."""
    deadline = time.monotonic() + patience
    while words not in (text := " ".join(machine.output(number).split())):
        assert time.monotonic() < deadline, text
        assert machine.started[number].poll() is None or words in " ".join(machine.output(number).split()), text
        time.sleep(0.3)
    return text


def wait_for_workers(cluster: Cluster, count: int, patience: float = 240) -> None:
    """Until that many workers are alive."""
    deadline = time.monotonic() + patience
    while (alive := cluster.head.output(1).splitlines()[-1:]) != [f"alive {count}"]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.5)


def builds_of(machine: Machine) -> dict[str, dict[str, object]]:
    """Records on a machine, by recipe."""
    text = machine.run("sh", "-c", f"cat {machine.home}/builds/*/record.json 2>/dev/null | tr -d '\\n'").out
    decoder, place, found = json.JSONDecoder(), 0, {}
    while place < len(text):
        entry, place = decoder.raw_decode(text, place)
        found[entry["recipe"]] = entry
    return found


def test_the_cell_of_a_worker_that_is_switched_off_in_mid_build_is_built_on_another(
    cluster: Cluster, workers: list[Machine]
) -> None:
    cluster.recipe("long", 12)
    cluster.recipe("short", 0)
    workers += [cluster.room.worker(cluster.head, "a1"), cluster.room.worker(cluster.head, "a2", core=1)]
    wait_for_workers(cluster, 2)
    running = cluster.laptop.start(cluster.command("long", "short"))
    number = len(cluster.laptop.started) - 1
    text = until(cluster.laptop, number, f"long:bare:{NATIVE} compile 1 jobs")
    victim = next(machine for machine in workers if f"long:bare:{NATIVE} on {machine.name}," in text)
    victim.power_off()
    assert running.wait(400) == 0, cluster.laptop.output(number)
    text = until(cluster.laptop, number, "its worker died")
    survivor = next(machine for machine in workers if machine is not victim)
    assert f"long:bare:{NATIVE} its worker died; on {survivor.name}" in text
    assert "2 built" in text
    found = builds_of(cluster.laptop)
    assert {recipe: entry["outcome"] for recipe, entry in found.items()} == {"long": "built", "short": "built"}


def test_two_drivers_at_once_build_a_cell_once(cluster: Cluster, workers: list[Machine]) -> None:
    cluster.recipe("shared", 8)
    workers += [cluster.room.worker(cluster.head, "b1"), cluster.room.worker(cluster.head, "b2", core=1)]
    wait_for_workers(cluster, 2)
    other = cluster.room.machine("desk")
    workers.append(other)
    runs = [machine.start(cluster.command("shared")) for machine in (cluster.laptop, other)]
    assert [run.wait(400) for run in runs] == [0, 0], other.output(0)
    texts = [cluster.laptop.output(len(cluster.laptop.started) - 1), other.output(0)]
    assert sum("is already being built for another run" in text for text in texts) == 1, texts
    assert sum(bool(builds_of(machine)) for machine in workers[:2]) == 1
    records = [builds_of(machine)["shared"] for machine in (cluster.laptop, other)]
    assert records[0] == records[1]


def test_a_driver_that_is_killed_finds_its_cells_again(cluster: Cluster, workers: list[Machine]) -> None:
    cluster.recipe("again", 15)
    workers.append(cluster.room.worker(cluster.head, "c1"))
    wait_for_workers(cluster, 1)
    other = cluster.room.machine("c2")
    workers.append(other)
    other.start(cluster.command("again"))
    until(other, 0, "compile 1 jobs")
    other.power_off()
    ended = cluster.laptop.run(*cluster.command("again"))
    assert ended.code == 0, ended.said
    assert ended.said.count(f"again:bare:{NATIVE} on c1") == 1


def test_ctrl_c_ends_the_builds_on_the_workers(cluster: Cluster, workers: list[Machine]) -> None:
    cluster.recipe("ended", 300)
    workers.append(cluster.room.worker(cluster.head, "d1"))
    wait_for_workers(cluster, 1)
    running = cluster.laptop.start(cluster.command("ended"))
    until(cluster.laptop, len(cluster.laptop.started) - 1, "compile 1 jobs")
    assert "bwrap" in workers[0].run("ps", "-eo", "comm").out
    # Not through nsenter, which a signal ends.
    assert cluster.laptop.run("pkill", "-INT", "-f", "builder build ended").code == 0
    assert running.wait(90) == 130, cluster.laptop.output(len(cluster.laptop.started) - 1)
    deadline = time.monotonic() + 30
    while "bwrap" in (text := workers[0].run("ps", "-eo", "comm").out) or "builder" in text:
        assert time.monotonic() < deadline, text
        time.sleep(0.5)


def test_a_worker_with_a_full_disk_leaves_its_cells_to_another(cluster: Cluster, workers: list[Machine]) -> None:
    cluster.recipe("roomy", 1)
    full = cluster.room.worker(cluster.head, "full", size="1m")
    workers.append(full)
    wait_for_workers(cluster, 1)
    filled = full.run("sh", "-c", f"cat /dev/zero > {full.home}/filler")
    assert "No space left" in filled.said
    alone = cluster.laptop.run(*cluster.command("roomy"))
    assert alone.code == 50, alone.said
    assert "no space left on the file system that holds" in alone.said
    workers.append(cluster.room.worker(cluster.head, "empty", core=1))
    wait_for_workers(cluster, 2)
    ended = cluster.laptop.run(*cluster.command("roomy", "roomy"))
    assert ended.code == 0, ended.said
    assert list(builds_of(workers[1])) == ["roomy"]


def test_a_slow_network_delays_and_breaks_nothing(cluster: Cluster, workers: list[Machine]) -> None:
    body = "import os\nreturn wheel(wheel_directory, name='heavy', files={'heavy/noise.bin': os.urandom(2 << 20)})"
    cluster.farm.recipe("heavy", projects.backend(body))
    workers.append(cluster.room.worker(cluster.head, "slow"))
    wait_for_workers(cluster, 1)
    workers[0].slow_down("1mbit")
    start = time.monotonic()
    ended = cluster.laptop.run(*cluster.command("heavy"), timeout=1200)
    assert ended.code == 0, ended.said
    assert time.monotonic() - start > 15  # 2 MiB at 1 Mbit/s
    assert builds_of(cluster.laptop)["heavy"]["wheel"] == builds_of(workers[0])["heavy"]["wheel"]


def test_a_worker_of_another_gracefarm_is_named_and_left_out(cluster: Cluster, workers: list[Machine], tmp_path: Path) -> None:
    cluster.recipe("picky", 0)
    for package in ("builder", "gracefarm"):
        shutil.copytree(REPOSITORY / package, load().home / "tests" / "other" / package, dirs_exist_ok=True)
    other = load().home / "tests" / "other"
    (other / "gracefarm" / "__init__.py").write_text('"""Another one."""\n')
    try:
        workers.append(cluster.room.worker(cluster.head, "old", PYTHONPATH=str(other)))
        wait_for_workers(cluster, 1)
        alone = cluster.laptop.run(*cluster.command("picky"))
        assert alone.code == 50, alone.said
        assert "this worker has gracefarm" in alone.said
        assert "remedy: install the same version of gracefarm on the worker and the client" in alone.said
        workers.append(cluster.room.worker(cluster.head, "new", core=1))
        wait_for_workers(cluster, 2)
        ended = cluster.laptop.run(*cluster.command("picky"))
        assert ended.code == 0, ended.said
        assert list(builds_of(workers[1])) == ["picky"]
    finally:
        shutil.rmtree(other)


def test_a_cell_for_which_no_worker_is_there_is_refused_by_name(cluster: Cluster, workers: list[Machine]) -> None:
    cluster.recipe("both", 0)
    workers.append(cluster.room.worker(cluster.head, "arm", arch="aarch64"))
    wait_for_workers(cluster, 1)
    ended = cluster.laptop.run(*cluster.command("both", target="x86_64"))
    assert ended.code == 50, ended.said
    assert "no worker of the Ray cluster can build for x86_64: its workers are aarch64" in ended.said
    assert "--resources '{\"x86_64\": 1}'" in ended.said


def test_a_head_that_starts_again_ends_the_run_and_the_same_command_goes_on(cluster: Cluster, workers: list[Machine]) -> None:
    """Last in this module: the cluster is another one after it."""
    cluster.recipe("first", 0)
    cluster.recipe("second", 200)
    head = cluster.room.head("head2")
    workers += [head, cluster.room.worker(head, "e1")]
    address = f"ray://{head.address}:10001"
    command = [*cluster.command("first", "second")[:-1], address, "--jobs", "1"]
    time.sleep(8)
    running = cluster.laptop.start(command)
    number = len(cluster.laptop.started) - 1
    until(cluster.laptop, number, f"second:bare:{NATIVE} compile 1 jobs")
    assert "first-1.0-py3-none-any.whl" in cluster.laptop.output(number)
    head.power_off()
    assert running.wait(180) == 51, cluster.laptop.output(number)
    text = " ".join(cluster.laptop.output(number).split())
    assert f"the Ray cluster at {address} has ended or does not answer" in text
    assert "finished builds are kept" in text
