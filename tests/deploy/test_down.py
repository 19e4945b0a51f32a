"""Nodes that are away, on SSH servers of this test: `deploy down` as a process, and spares that nobody waits for."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

import psutil
import pytest

from deploy.fleet.jobs import job_status, start_job
from deploy.fleet.shells import remote_nodes
from deploy.nodes import state
from deploy.nodes.facts import load_facts
from deploy.nodes.state import State, StepRecord
from deploy.remote import marked
from deploy.steps import environment, processes, ray, spares, step
from deploy.steps.environment import Matrix, Module
from deploy.steps.step import Work
from gracefarm import settings
from gracefarm.console import Console
from gracefarm.errors import InstallError, NodeError, SshError
from tests.deploy.test_tunnel import deploy
from tests.deploy.test_watch import Scene, play

SLEEPS = "exec sleep 300"


async def down(made: Scene, *words: str) -> tuple[int, str]:
    """`deploy down`: exit code and all that it says."""
    async with deploy(made.folder, "down", *words) as process:
        out, err = await asyncio.wait_for(process.communicate(), 60)
        assert process.returncode is not None
        return process.returncode, out.decode() + err.decode()


def alive(pid: int) -> bool:
    """A zombie is not; whoever is first of this machine's processes may be slow to take it away."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def running(made: Scene) -> list[tuple[str, str]]:
    """Node and job of all that run, also where nobody is let in."""
    found = []
    for machine in made.made:
        for job in ("engine", "ray"):
            pid = Path(f"{made.fleet.local}/{made.fleet.mark}/{machine.node.name}/jobs/{job}/pid")
            if pid.exists() and alive(int(pid.read_text().split()[0])):
                found.append((machine.node.name, job))
    return found


def test_with_a_node_away_everything_ends_on_all_others_and_then_it_is_told(tmp_path: Path) -> None:
    async def work(made: Scene) -> None:
        head, _, last = made.fleet.nodes
        await start_job(made.fleet, head, "engine", SLEEPS)
        for node in made.fleet.nodes:
            await start_job(made.fleet, node, "ray", SLEEPS)
        steps = {name: StepRecord(digest="x", outcome="done", begun=time.time()) for name in ("ray", "engine", "weights")}
        made.deployment.folder.state.write_text(State(steps=steps).model_dump_json())
        async with deploy(made.folder, "tunnel") as tunnel:
            assert tunnel.stdout
            await asyncio.wait_for(tunnel.stdout.readline(), 30)
            await made.made[2].switch_off()
            code, said = await down(made)
            assert code == 60, said
            assert "k2 127.0.0.13" in said
            assert "cannot be reached" in said
            assert running(made) == [("k2", "ray")]
            assert (await job_status(made.fleet, head, "engine")).state == "stopped"
            assert await asyncio.wait_for(tunnel.wait(), 10) is not None
        assert set(state.read(made.deployment.folder).steps) == {"weights"}
        await made.made[2].listen()
        code, said = await down(made)
        assert code == 0, said
        assert "nothing of this deployment runs any more" in said
        assert (await job_status(made.fleet, last, "ray")).state == "stopped"
        assert running(made) == []

    play(tmp_path, work, nodes=3)


def test_a_spare_that_is_away_is_left_out_and_a_node_that_serves_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def work(made: Scene) -> None:
        nothing = made.plan.model_copy(update={"spares": ("k1", "gone")})
        (made.deployment.folder.path / "plan.json").write_text(nothing.model_dump_json())
        with state.hold(made.deployment.folder, "test", on_wait=pytest.fail) as keeper:
            whole = Work(
                deployment=made.deployment,
                fleet=made.fleet,
                facts=load_facts(made.deployment),
                keeper=keeper,
                console=Console(),
                settings=settings.load(),
            )
            assert await spares.without_lost_spares(whole) == whole
            await made.made[1].switch_off()
            with pytest.raises(SshError, match="k1 "):
                await step.look_at_nodes(whole)
            less = await spares.without_lost_spares(whole)
            assert [node.name for node in less.nodes] == ["k0", "k2"]
            assert less.inventory != whole.inventory  # what is done without it is done for it when it is back
            assert set(await step.look_at_nodes(less)) == {"k0", "k2"}
            await made.made[2].switch_off()
            again = await spares.without_lost_spares(whole)
            assert [node.name for node in again.nodes] == ["k0", "k2"]
            with pytest.raises(SshError, match="k2 "):
                await step.look_at_nodes(again)

    play(tmp_path, work, nodes=3)
    assert "it is a spare: going on without it" in capsys.readouterr().err


def test_ray_makes_room_for_itself_and_not_of_a_build_or_a_download_that_is_at_work(tmp_path: Path) -> None:
    """As after `deploy up --from environment`, killed, and then `deploy serve --skip-up`."""

    async def work(made: Scene) -> None:
        head = made.fleet.nodes[0]
        for job, env in (("build-env", {}), ("weights", {}), ("ray", {processes.PLAN_MARK: "another"})):
            await start_job(made.fleet, head, job, SLEEPS, env)
        spec = ray.ClusterSpec(plan=made.plan.model_copy(update={"nodes": made.plan.nodes[:1]}), python="python3")
        with pytest.raises(InstallError, match="ray does not import"):
            await ray.start_missing(made.fleet, remote_nodes(made.fleet), spec, Console())
        states = {job: (await job_status(made.fleet, head, job)).state for job in ("build-env", "weights", "ray")}
        assert states == {"build-env": "running", "weights": "running", "ray": "lost"}
        await processes.stop(remote_nodes(made.fleet), made.fleet.mark)

    play(tmp_path, work)


def test_what_a_killed_command_left_of_its_import_matrix_is_ended(tmp_path: Path) -> None:
    async def work(made: Scene) -> None:
        (tmp_path / "env" / "bin").mkdir(parents=True)
        (tmp_path / "env" / "bin" / "python").symlink_to(sys.executable)
        begun = tmp_path / "begun"
        code = f"import time; open({str(begun)!r}, 'w').close(); time.sleep(300)"
        slow = Matrix(modules=(Module(module="slow", code=code),))
        proof = asyncio.create_task(environment.prove(remote_nodes(made.fleet), str(tmp_path / "env"), slow, 300))
        prefix = f"{made.fleet.mark}/k0/"
        async with asyncio.timeout(20):
            while not begun.exists():  # noqa: ASYNC110 - what the worker starts before, to ask for GPUs, ends by itself
                await asyncio.sleep(0.05)
        left = [process for process in marked.processes(prefix) if process["name"].startswith("python")]
        assert len(left) == 2, "the worker, and Python that imports"
        made.made[0].cut()
        with pytest.raises(NodeError):
            await proof
        assert all(alive(process["pid"]) for process in left)
        code, said = await down(made)
        assert code == 0, said
        assert not any(alive(process["pid"]) for process in left)

    play(tmp_path, work)
