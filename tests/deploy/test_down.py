"""Nodes that are away, on SSH servers of this test: `deploy down` as a process, and spares that `down` does not wait for."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path

import psutil
import pytest

from deploy.fleet.calls import call
from deploy.fleet.files import put_file
from deploy.fleet.jobs import job_status, start_job
from deploy.fleet.shells import remote_nodes
from deploy.nodes import paths, state
from deploy.nodes.facts import load_facts
from deploy.nodes.state import State, StepRecord
from deploy.remote import marked
from deploy.remote.removal import size_of
from deploy.steps import environment, processes, ray, spares, step
from deploy.steps.environment import Matrix, Module
from deploy.steps.step import Work
from gracefarm import settings
from gracefarm.console import Console
from gracefarm.errors import HostError, InstallError, NodeError, SshError
from tests.deploy.scene_kit import Scene, play
from tests.deploy.test_tunnel import deploy

SLEEPS = "exec sleep 300"


async def down(made: Scene, *words: str) -> tuple[int, str]:
    """`deploy down`: exit code and all that it says."""
    async with deploy(made.folder, "down", *words) as process:
        out, err = await asyncio.wait_for(process.communicate(), 60)
        assert process.returncode is not None
        return process.returncode, out.decode() + err.decode()


async def purge(made: Scene, *words: str) -> tuple[int, str]:
    """`deploy purge`: the same."""
    async with deploy(made.folder, "purge", *words) as process:
        out, err = await asyncio.wait_for(process.communicate(), 60)
        assert process.returncode is not None
        return process.returncode, out.decode() + err.decode()


def alive(pid: int) -> bool:
    """A zombie does not count: process 1 of this machine may reap it late."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def running(made: Scene) -> list[tuple[str, str]]:
    """Node and job of each running process, also on nodes that refuse logins."""
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
            assert "; processes stopped on the other nodes: 4 on k0, 2 on k1" in said
            assert "repeat `deploy down`, since processes on k2 may still run and cost" in said
            assert said.count("cannot be reached") == 1
            assert running(made) == [("k2", "ray")]
            assert (await job_status(made.fleet, head, "engine")).state == "stopped"
            assert await asyncio.wait_for(tunnel.wait(), 10) is not None
        assert set(state.read(made.deployment.folder).steps) == {"weights"}
        await made.made[2].listen()
        code, said = await down(made)
        assert code == 0, said
        assert "no process of this deployment is running" in said
        assert (await job_status(made.fleet, last, "ray")).state == "stopped"
        assert running(made) == []

    play(tmp_path, work, nodes=3)


def names(folder: Path, pattern: str = "*") -> list[str]:
    """Of what is there."""
    return sorted(path.name for path in folder.glob(pattern))


def owned_root(made: Scene, owner: str) -> Path:
    """A folder of environments, as a deployment claims it."""
    root = Path(paths.environment_root(made.deployment))
    (root / "envs").mkdir(parents=True)
    (root / "owner").write_text(owner)
    return root


def left_by_ray(base: Path, mark: str) -> None:
    """Ray's folder, and one that is not ours."""
    (base / mark[:8]).mkdir()
    (base / mark[:8] / "session_1").write_text("ray's")
    (base / "of-another-deployment").mkdir()


def slow_uv(folder: Path) -> Path:
    """Replaces uv in the middle of a long installation: the environment is half made."""
    uv = folder / "uv"
    uv.write_text('#!/bin/sh\nfor last; do case $last in */envs/*) mkdir -p "$last/bin";; esac; done\nexec sleep 300\n')
    uv.chmod(0o755)
    return uv


def downloaded(made: Scene) -> tuple[Path, Path]:
    """The folder of a model, which the state has, and an incomplete download of another commit."""
    root = Path(paths.root(made.deployment))
    model = Path(paths.weights(str(root), made.deployment.data.model.repo, "c" * 40))
    partial = model.with_name(f"{'d' * 40}.{made.fleet.mark}.staging")
    for folder in (model, partial, model.with_name(f"{'d' * 40}.another.staging")):
        folder.mkdir(parents=True)
    Path(f"{model}.manifest.json").write_text("{}")
    record = StepRecord(digest="x", outcome="done", begun=time.time(), data={"folder": str(model)})
    steps = {"preflight": record, "weights": record}
    made.deployment.folder.state.write_text(State(steps=steps).model_dump_json())
    return model, partial


def secrets_on(made: Scene) -> dict[str, list[str]]:
    """Node to the secrets that lie in its folder."""
    folders = {node.name: Path(f"{made.fleet.local}/{made.fleet.mark}/{node.name}") for node in made.fleet.nodes}
    return {name: sorted(path.name for path in folder.glob("*-*") if path.is_file()) for name, folder in folders.items()}


def test_down_removes_the_secrets_of_every_node_and_purge_all_that_was_put_there(tmp_path: Path) -> None:
    async def work(made: Scene) -> None:
        base, mark = Path(made.fleet.local), made.fleet.mark
        for node in remote_nodes(made.fleet):
            for name in ("ray-token", "api-key"):
                await put_file(node, b"secret", f"{base}/{mark}/{node.name}/{name}")
            await start_job(made.fleet, made.deployment.node(node.name), "ray", SLEEPS)
            log = base / mark / node.name / "jobs" / "ray" / "log"
            for _ in range(200):  # a job that ends before it has begun leaves none
                if not log.is_file():
                    await asyncio.sleep(0.05)
        assert set(map(tuple, secrets_on(made).values())) == {("api-key", "ray-token")}
        code, said = await down(made)
        assert code == 0, said
        assert set(map(tuple, secrets_on(made).values())) == {()}
        assert "log" in names(base / mark / "k1" / "jobs" / "ray")  # for `deploy collect`
        left_by_ray(base, mark)
        caches = [tmp_path / node / ".cache" / "gracefarm" for node in ("home-k0", "home-k1")]
        for cache in caches:
            (cache / "uv-0.1").mkdir(parents=True)
        root = owned_root(made, mark)
        code, said = await purge(made)
        assert code == 2, said
        assert "nothing was removed" in said
        await start_job(made.fleet, made.fleet.nodes[1], "ray", SLEEPS)
        code, said = await purge(made, "--yes")
        assert code == 0, said
        assert running(made) == []
        assert names(base) == ["of-another-deployment"]
        assert [cache.exists() for cache in caches] == [False, False]
        assert names(root) == ["envs", "owner"]
        code, said = await purge(made, "--yes", "--share")
        assert code == 0, said
        assert names(root.parent.parent, "gracefarm") == []
        assert state.read(made.deployment.folder).steps == {}

    play(tmp_path, work, nodes=2)


def test_the_size_of_a_folder_that_vanishes_meanwhile_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`purge` failed when a process that was about to end removed its own files."""
    (tmp_path / "vanishes").mkdir()
    (tmp_path / "stays").write_bytes(b"x" * 10)
    listed = os.scandir

    def scandir(path: str) -> object:
        if Path(path).name == "vanishes":
            Path(path).rmdir()
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert size_of(tmp_path) >= 10
    assert names(tmp_path) == ["stays"]


def test_purge_removes_the_model_only_if_asked_and_then_also_what_is_half_there(tmp_path: Path) -> None:
    """A purge without --weights forgot where the model is, and the next one with it removed nothing and succeeded."""

    async def work(made: Scene) -> None:
        model, partial = downloaded(made)
        code, said = await purge(made, "--yes")
        assert code == 0, said
        assert model.exists()
        assert partial.exists()
        assert set(state.read(made.deployment.folder).steps) == {"weights"}
        code, said = await purge(made, "--yes", "--weights")
        assert code == 0, said
        assert names(model.parent) == [f"{'d' * 40}.another.staging"]
        assert state.read(made.deployment.folder).steps == {}

    play(tmp_path, work)


@pytest.mark.skipif(any(Path("/etc").glob("*.gracefarm*")), reason="this machine is a node with a cache")
def test_purge_names_the_nodes_whose_cache_it_keeps_and_removes_it_if_asked(tmp_path: Path) -> None:
    async def work(made: Scene) -> None:
        record = StepRecord(digest="x", outcome="done", begun=0, data={"fsc": {"k0": True, "k1": False}})
        made.deployment.folder.state.write_text(State(steps={"cache": record}).model_dump_json())
        for _ in range(2):
            code, said = await purge(made, "--yes")
            assert code == 0, said
            assert "the cache of the shared folder is kept on k0; `deploy purge --cache` removes it" in said
        code, said = await purge(made, "--yes", "--cache")  # no cache was set up here
        assert code == 0, said
        assert "is kept on" not in said
        assert state.read(made.deployment.folder).steps == {}

    play(tmp_path, work, nodes=2)


def test_purge_leaves_the_environments_of_another_deployment(tmp_path: Path) -> None:
    async def work(made: Scene) -> None:
        root = owned_root(made, "alice")
        code, said = await purge(made, "--yes", "--share")
        assert code == 4, said
        assert f"{root} belongs to another deployment (alice)" in said
        assert names(root) == ["envs", "owner"]

    play(tmp_path, work)


def test_down_removes_what_a_build_that_was_killed_had_half_made(tmp_path: Path) -> None:
    """Under load its own removal took longer than `down` waits, and the folder stayed."""

    async def work(made: Scene) -> None:
        root, head = Path(paths.environment_root(made.deployment)), remote_nodes(made.fleet)[0]
        python = {"source": "system", "version": f"3.{sys.version_info[1]}"}
        request = {
            "root": str(root),
            "id": "e" * 32,
            "lock": "",
            "packages": [],
            "index": None,
            "python": python,
            "uv": str(slow_uv(tmp_path)),
        }
        build = asyncio.create_task(call(head, "environment.build", request, job="build-env"))
        async with asyncio.timeout(30):
            while not names(root, "envs/.*/bin"):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        for process in marked.processes(f"{made.fleet.mark}/k0/"):
            psutil.Process(process["pid"]).kill()
        with pytest.raises(HostError):
            await build
        assert names(root, "envs/.*")
        code, said = await down(made)
        assert code == 0, said
        assert names(root, "envs/.*") == []
        assert names(tmp_path / "home-k0", "gracefarm-env-*") == []

    play(tmp_path, work)


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
    assert "this node is a spare and is ignored" in capsys.readouterr().err


def test_ray_makes_room_for_itself_and_not_of_a_build_or_a_download_that_is_at_work(tmp_path: Path) -> None:
    """As after `deploy up --from environment`, killed, and then `deploy serve --skip-up`."""

    async def work(made: Scene) -> None:
        head = made.fleet.nodes[0]
        for job, env in (("build-env", {}), ("weights", {}), ("ray", {processes.PLAN_MARK: "another"})):
            await start_job(made.fleet, head, job, SLEEPS, env)
        spec = ray.ClusterSpec(plan=made.plan.model_copy(update={"nodes": made.plan.nodes[:1]}), python="python3")
        with pytest.raises(InstallError, match="ray cannot be imported"):
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
