"""`deploy down` as a process, on nodes that are SSH servers of this test: what it ends, and what it tells of nodes that are away."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import psutil

from deploy import state
from deploy.state import Record, State
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


async def running(made: Scene) -> list[tuple[str, str]]:
    """Node and job of all that run, also where nobody is let in."""
    found = []
    for one in made.made:
        for job in ("engine", "ray"):
            pid = Path(f"{made.fleet.local}/{made.fleet.mark}/{one.node.name}/jobs/{job}/pid")
            if pid.exists() and alive(int(pid.read_text().split()[0])):
                found.append((one.node.name, job))
    return found


def test_with_a_node_away_everything_ends_on_all_others_and_then_it_is_told(tmp_path: Path) -> None:
    async def work(made: Scene) -> None:
        head, _, last = made.fleet.nodes
        await made.fleet.start_job(head, "engine", SLEEPS)
        for node in made.fleet.nodes:
            await made.fleet.start_job(node, "ray", SLEEPS)
        steps = {name: Record(digest="x", outcome="done", begun=time.time()) for name in ("ray", "engine", "weights")}
        made.deployment.folder.state.write_text(State(steps=steps).model_dump_json())
        async with deploy(made.folder, "tunnel") as tunnel:
            assert tunnel.stdout
            await asyncio.wait_for(tunnel.stdout.readline(), 30)
            await made.made[2].switch_off()
            code, said = await down(made)
            assert code == 60, said
            assert "k2 127.0.0.13" in said
            assert "cannot be reached" in said
            assert await running(made) == [("k2", "ray")]
            assert (await made.fleet.job_status(head, "engine")).state == "stopped"
            assert await asyncio.wait_for(tunnel.wait(), 10) is not None
        assert set(state.read(made.deployment.folder).steps) == {"weights"}
        await made.made[2].listen()
        code, said = await down(made)
        assert code == 0, said
        assert "nothing of this deployment runs any more" in said
        assert (await made.fleet.job_status(last, "ray")).state == "stopped"
        assert await running(made) == []

    play(tmp_path, work, nodes=3)
