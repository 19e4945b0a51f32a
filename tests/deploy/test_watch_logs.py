"""`deploy logs` over real SSH servers: the logs of the engine and of Ray, across lost connections and without secrets."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

from deploy.fleet.jobs import start_job
from deploy.fleet.shells import remote_nodes
from deploy.nodes.facts import load_facts
from deploy.steps import engine
from deploy.watch import logs
from deploy.watch.logs import Wish
from tests.deploy.scene_kit import Scene, play, ray_logs
from tests.deploy.test_tunnel import deploy, until


def test_the_engines_log_from_the_last_lines_on_and_after_a_cut(tmp_path: Path) -> None:
    async def work(made: Scene) -> None:
        loop = "i=0; while [ $i -lt 40 ]; do echo line $i; i=$((i+1)); [ $i -lt 20 ] || sleep 0.1; done"
        head = made.deployment.head
        await start_job(made.fleet, head, "engine", loop)
        log = Path(await made.fleet.folder(head)) / "jobs" / "engine" / "log"
        await until(lambda: "line 19" in log.read_text())
        said: list[str] = []
        wish = Wish(lines=3, follow=True, pause=0.1)
        following = asyncio.create_task(logs.engine_log(made.fleet, head, wish, lambda _n, _l, text: said.append(text)))
        await until(lambda: "line 24" in said)
        made.made[0].cut()
        done = await asyncio.wait_for(following, 30)
        assert done.state == "exited"
        numbers = [int(line.split()[1]) for line in said]
        assert numbers == list(range(numbers[0], 40))
        assert 16 <= numbers[0] <= 20
        once: list[str] = []
        await logs.engine_log(made.fleet, head, Wish(lines=2), lambda _n, _l, text: once.append(text))
        assert once == ["line 38", "line 39"]

    play(tmp_path, work)


def test_rays_logs_are_followed_over_a_cut_and_into_a_new_session(tmp_path: Path) -> None:
    async def work(made: Scene) -> None:
        first = ray_logs(made, "session_2026-11-24_1")
        (first / "raylet.out").write_text("".join(f"old {number}\n" for number in range(9)))
        facts, said, cuts = load_facts(made.deployment), [], []
        (node,) = remote_nodes(made.fleet, facts)
        wish = Wish(lines=2, follow=True, pause=0.2)
        following = asyncio.create_task(
            logs.ray_logs(
                made.deployment,
                facts,
                node,
                wish,
                lambda _node, log, text: said.append(f"{log}: {text}"),
                lambda name, _error: cuts.append(name),
            )
        )
        await until(lambda: len(said) == 2)
        assert said == ["raylet.out: old 7", "raylet.out: old 8"]
        with (first / "raylet.out").open("a") as stream:
            stream.write("new 0\nhalf of")
        await until(lambda: len(said) == 3)
        await made.made[0].switch_off()
        with (first / "raylet.out").open("a") as stream:
            stream.write(" a line\n")
        (first / "gcs_server.out").write_text("came meanwhile\n")
        await until(lambda: bool(cuts))
        await made.made[0].listen()
        await until(lambda: len(said) == 5)
        assert sorted(said[2:]) == ["gcs_server.out: came meanwhile", "raylet.out: half of a line", "raylet.out: new 0"]
        second = ray_logs(made, "session_2026-11-24_2")
        (second / "raylet.out").write_text("from the start\n")
        await until(lambda: said[-1] == "raylet.out: from the start")
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        assert cuts == ["k0"]

    play(tmp_path, work)


def test_a_follower_that_a_cut_has_left_behind_ends(tmp_path: Path) -> None:
    """sshd closes the pipe of a session that has gone; nothing else tells the process."""
    (tmp_path / "a.log").write_text("line\n")
    patterns = [{"name": "", "pattern": str(tmp_path / "*.log")}]
    arguments = {"patterns": patterns, "lines": 5, "follow": True, "offsets": {}}
    child = subprocess.Popen([sys.executable, "-m", "deploy.remote"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdin
        assert child.stdout
        child.stdin.write(json.dumps({"call": "watch.tail", "arguments": arguments}).encode())
        child.stdin.close()
        assert b"line" in child.stdout.readline()
        child.stdout.close()
        child.wait(20)
    finally:
        child.kill()
        child.wait()


def test_the_command_shows_no_secret_and_names_node_and_log(tmp_path: Path) -> None:
    async def work(made: Scene) -> None:
        for words, code, message in (
            (("logs",), 63, "no engine was started"),
            (("logs", "k0"), 0, "Ray has no logs on this node"),
        ):
            async with deploy(tmp_path, *words) as process:
                _, err = await asyncio.wait_for(process.communicate(), 30)
                assert (process.returncode, message in err.decode()) == (code, True), err.decode()
        key = engine.api_key(made.deployment.folder)
        head = made.deployment.head
        await start_job(made.fleet, head, "engine", f"echo started with {key}; echo and hf_{'a' * 34}")
        log = ray_logs(made, "session_2026-11-24_1") / "raylet.err"
        log.write_text(f"Authorization: Bearer {key}\n")
        async with deploy(tmp_path, "logs", "k0") as process:
            out, err = await asyncio.wait_for(process.communicate(), 30)
            assert process.returncode == 0, err.decode()
        text = out.decode()
        assert "k0 engine started with [redacted]" in text
        assert "k0 raylet.err Authorization: Bearer [redacted]" in text
        assert key not in text
        assert "hf_aaa" not in text

    play(tmp_path, work)
