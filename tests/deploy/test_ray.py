"""Ray 2.60 from PyPI on the rehearsal's nodes: started by the plan, asked, repeated, repaired, stopped; and its failures."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

import pytest

from deploy.fleet.calls import RemoteNode
from deploy.fleet.shells import remote_nodes
from deploy.fleet.ssh import Fleet, open_fleet
from deploy.nodes import paths
from deploy.nodes.deployment import Deployment
from deploy.nodes.facts import load_facts
from deploy.planning import plans
from deploy.planning.plans import ServePlan
from deploy.rehearsal.rig import MOUNT, Rig, open_rig
from deploy.steps import processes, ray
from gracefarm.console import Console
from gracefarm.errors import EngineError
from tests.deploy import nodefaults, ray_kit

pytestmark = pytest.mark.root
T = TypeVar("T")


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with open_rig(tmp_path_factory.mktemp("rig"), count=3) as made:
        ray_kit.bring_ray(made)
        yield made


@pytest.fixture(scope="module")
def deployment(room: Rig, tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    return ray_kit.deployment(room, tmp_path_factory.mktemp("deployment"))


DEATH = "[2026-11-25 01:02:03,456 C 812 812] (raylet) main.cc:701: Timed out waiting for file metrics_agent_port"
"What nine workers at once on two cores said, and eight died of (ray#65983)."
MORTAL = f"""#!/bin/sh
# The real ray; but on k1, as often as $0.deaths says, it ends as it does where the machine is too slow for it.
case "$GRACEFARM_MARK" in */k1/*) left=$(cat "$0.deaths") ;; *) left=0 ;; esac
[ "$left" -gt 0 ] || exec {MOUNT}/rayenv/bin/ray "$@"
echo $((left - 1)) > "$0.deaths"
while [ "$1" != --temp-dir ]; do shift; done
mkdir -p "$2/session_1/logs"
ln -sfn session_1 "$2/session_latest"
printf '%s\\n' 'all is well' '{DEATH}' 'and more' > "$2/session_1/logs/raylet.out"
echo 'Ray runtime could not be started.'
exit 1
"""


def let_die(room: Rig, times: int) -> None:
    """The next starts of Ray on k1."""
    deaths = room.share / "mortal-ray.deaths"
    deaths.write_text(f"{times}\n")
    deaths.chmod(0o666)


@pytest.fixture(scope="module")
def plan(room: Rig, deployment: Deployment) -> ServePlan:
    """With a ray that can be told to die."""
    program = room.share / "mortal-ray"
    program.write_text(MORTAL)
    program.chmod(0o755)
    let_die(room, 0)
    made = ray_kit.planned(room, deployment)
    nodes = tuple(node.model_copy(update={"ray": (f"{MOUNT}/mortal-ray", *node.ray[1:])}) for node in made.nodes)
    return plans.identified(made.model_copy(update={"nodes": nodes, "id": ""}))


def with_nodes(room: Rig, deployment: Deployment, work: Callable[[Fleet, list[RemoteNode]], Awaitable[T]]) -> T:
    async def go() -> T:
        async with open_fleet(deployment, config=[], connect_timeout=5) as made:
            return await work(made, remote_nodes(made, load_facts(deployment)))

    with room.inside():
        return asyncio.run(go())


def up(room: Rig, deployment: Deployment, plan: ServePlan, **more: object) -> ray.Started:
    python = paths.program(deployment, "python")
    spec = ray.ClusterSpec(plan=plan, python=python, token=ray_kit.TOKEN, **more)  # type: ignore[arg-type]
    return with_nodes(room, deployment, lambda made, nodes: ray.start_missing(made, nodes, spec, Console()))


def down(room: Rig, deployment: Deployment) -> dict[str, int]:
    return with_nodes(room, deployment, lambda made, nodes: processes.stop(nodes, made.mark))


def raylets(room: Rig) -> dict[str, list[int]]:
    return {
        node.name: [each["pid"] for each in node.processes() if each["argv"] and each["argv"][0].endswith("/raylet/raylet")]
        for node in room.nodes
    }


def anything_of_ray(room: Rig) -> list[str]:
    return [
        " ".join(each["argv"])[:80]
        for node in room.nodes
        for each in node.processes()
        if any(word in " ".join(each["argv"]) for word in ("ray::", "raylet", "gcs_server", "rayenv"))
    ]


def changed(plan: ServePlan) -> ServePlan:
    nodes = tuple(node.model_copy(update={"env": {**node.env, "NCCL_DEBUG": "INFO"}}) for node in plan.nodes)
    return plans.identified(plan.model_copy(update={"nodes": nodes, "id": ""}))


@pytest.mark.slow
def test_a_cluster_comes_up_is_left_alone_repaired_changed_and_stopped(
    room: Rig, deployment: Deployment, plan: ServePlan, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan.spares == ("k2",)
    let_die(room, 1)
    first = up(room, deployment, plan)
    assert f"k1: Ray did not start (raylet.out: {DEATH}); trying once more\n" in capsys.readouterr().err
    assert first.started == ("k0", "k1")
    assert first.gpus == 2
    running = raylets(room)
    assert [len(pids) for pids in running.values()] == [1, 1, 0]  # the spare is not part of it
    everybody = [each for node in room.nodes for each in node.processes()]
    assert not any(ray_kit.TOKEN in part for process in everybody for part in process["argv"])
    assert not any(ray_kit.TOKEN in value for process in everybody for value in process["environ"].values())

    again = up(room, deployment, plan)
    assert again.started == ()
    assert raylets(room) == running

    nodefaults.kill(room["k1"], running["k1"][0])
    repaired = up(room, deployment, plan)
    assert repaired.started == ("k1",)
    assert raylets(room)["k0"] == running["k0"]

    other = up(room, deployment, changed(plan))  # another plan: everything is stopped first
    assert set(other.stopped) == {"k0", "k1"}
    assert other.started == ("k0", "k1")
    assert raylets(room)["k0"] != running["k0"]

    assert down(room, deployment)["k0"] > 3
    assert anything_of_ray(room) == []
    assert down(room, deployment) == {"k0": 0, "k1": 0, "k2": 0}


@pytest.mark.slow
def test_a_second_death_is_the_error_with_node_and_cause_and_leaves_nothing_there(
    room: Rig, deployment: Deployment, plan: ServePlan
) -> None:
    let_die(room, 2)
    with pytest.raises(EngineError) as told:
        up(room, deployment, plan)
    cause = f"k1: `ray start` failed with exit code 1: Ray runtime could not be started.: raylet.out: {DEATH}"
    assert (told.value.cause, "`deploy logs k1`" in told.value.remedy) == (cause, True)
    assert (room.share / "mortal-ray.deaths").read_text() == "0\n"
    assert [len(pids) for pids in raylets(room).values()] == [1, 0, 0]  # the head's stays: the next start goes on from it
    assert down(room, deployment)["k1"] == 0


RESERVE = """
import sys, ray
ray.init(address=sys.argv[1], _node_ip_address=sys.argv[2], log_to_driver=False)
assert ray.util.placement_group([{"GPU": 1}], lifetime="detached").wait(60)
"""
"Reserves a GPU forever, as a placement group does that Ray removed while one of its nodes came back."


@pytest.mark.slow
def test_ray_is_started_again_if_it_does_not_release_the_gpus_of_an_engine(
    room: Rig, deployment: Deployment, plan: ServePlan, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "RELEASE", 3)
    up(room, deployment, plan)
    running = raylets(room)
    head = plan.head
    env = [f"{name}={value}" for name, value in head.env.items() if name.startswith("RAY_")]
    argv = ["env", *env, f"{MOUNT}/rayenv/bin/python", "-c", RESERVE, ray.address(plan), head.private]
    done = room["k0"].execute(argv)
    assert done.returncode == 0, done.stderr
    again = up(room, deployment, plan)
    assert "starting Ray again: it reserves 1 of 2 GPUs for an engine that has ended\n" in capsys.readouterr().err
    assert again.started == ("k0", "k1")
    assert raylets(room)["k0"] != running["k0"]
    assert up(room, deployment, plan).started == ()
    down(room, deployment)
    assert anything_of_ray(room) == []
