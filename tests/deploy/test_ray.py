"""Ray 2.60 from PyPI on the rehearsal's nodes: started by the plan, asked, repeated, repaired, stopped; and its failures."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

import pytest

from deploy import facts, paths
from deploy import plan as planning
from deploy.inventory import Deployment
from deploy.plan import Plan
from deploy.rehearsal.nodes import Rig, rig
from deploy.ssh import Fleet, fleet
from deploy.steps import ray
from deploy.targets import targets
from deploy.worker import Target
from gracefarm.console import Console
from tests.deploy import ray_kit

pytestmark = pytest.mark.root
T = TypeVar("T")


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with rig(tmp_path_factory.mktemp("rig"), count=3) as made:
        ray_kit.bring_ray(made)
        yield made


@pytest.fixture(scope="module")
def deployment(room: Rig, tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    return ray_kit.deployment(room, tmp_path_factory.mktemp("deployment"))


@pytest.fixture(scope="module")
def plan(room: Rig, deployment: Deployment) -> Plan:
    return ray_kit.planned(room, deployment)


def with_nodes(room: Rig, deployment: Deployment, work: Callable[[Fleet, list[Target]], Awaitable[T]]) -> T:
    async def go() -> T:
        async with fleet(deployment, config=[], connect_timeout=5) as made:
            return await work(made, targets(made, facts.load(deployment)))

    with room.inside():
        return asyncio.run(go())


def up(room: Rig, deployment: Deployment, plan: Plan, **more: object) -> ray.Outcome:
    python = paths.program(deployment, "python")
    spec = ray.Spec(plan=plan, python=python, token=ray_kit.TOKEN, **more)  # type: ignore[arg-type]
    return with_nodes(room, deployment, lambda made, nodes: ray.up(made, nodes, spec, Console()))


def down(room: Rig, deployment: Deployment) -> dict[str, int]:
    return with_nodes(room, deployment, lambda made, nodes: ray.stop(nodes, made.mark))


def raylets(room: Rig) -> dict[str, list[int]]:
    return {
        one.name: [each["pid"] for each in one.processes() if each["argv"] and each["argv"][0].endswith("/raylet/raylet")]
        for one in room.nodes
    }


def anything_of_ray(room: Rig) -> list[str]:
    return [
        " ".join(each["argv"])[:80]
        for one in room.nodes
        for each in one.processes()
        if any(word in " ".join(each["argv"]) for word in ("ray::", "raylet", "gcs_server", "rayenv"))
    ]


def changed(plan: Plan) -> Plan:
    nodes = tuple(one.model_copy(update={"env": {**one.env, "NCCL_DEBUG": "INFO"}}) for one in plan.nodes)
    return planning.identified(plan.model_copy(update={"nodes": nodes, "id": ""}))


def test_a_cluster_comes_up_is_left_alone_repaired_changed_and_stopped(room: Rig, deployment: Deployment, plan: Plan) -> None:
    assert plan.spares == ("k2",)
    first = up(room, deployment, plan)
    assert first.started == ("k0", "k1")
    assert first.gpus == 2
    running = raylets(room)
    assert [len(one) for one in running.values()] == [1, 1, 0]  # the spare is not part of it
    everybody = [each for one in room.nodes for each in one.processes()]
    assert not any(ray_kit.TOKEN in part for one in everybody for part in one["argv"])
    assert not any(ray_kit.TOKEN in value for one in everybody for value in one["environ"].values())

    again = up(room, deployment, plan)
    assert again.started == ()
    assert raylets(room) == running

    room["k1"].kill(running["k1"][0])
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
