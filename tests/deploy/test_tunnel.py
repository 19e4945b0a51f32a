"""The tunnel over real SSH servers: taken ports, a cut in the middle, and the command's end by Ctrl-C."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy.engine.completion import CompletionServer, Prompt, stream
from deploy.fleet import tunnels
from deploy.fleet.ssh import Fleet
from deploy.fleet.tunnels import WantedPort
from deploy.nodes.deployment import Folder
from gracefarm.errors import GracefarmError, SshError
from tests.deploy import kit, openai_server

ROOT = Path(__file__).parent.parent.parent


def on_a_node(folder: Path, work: Callable[[Fleet, kit.Machine], Awaitable[None]]) -> None:
    async def go() -> None:
        async with kit.machines(folder, 1) as made, kit.fleet(folder, made) as fleet:
            await work(fleet, made[0])

    asyncio.run(go())


async def models(port: int) -> str:
    async with httpx.AsyncClient(trust_env=False, timeout=5) as client:
        return str((await client.get(f"http://127.0.0.1:{port}/v1/models")).json()["data"][0]["id"])


def test_two_ports_lead_there_and_a_taken_one_is_replaced(tmp_path: Path) -> None:
    async def work(fleet: Fleet, machine: kit.Machine) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken, openai_server.server() as (url, _):
            there, here = int(url.rpartition(":")[2]), taken.getsockname()[1]
            wanted = [WantedPort(name="engine", remote=there, local=0), WantedPort(name="dashboard", remote=there, local=here)]
            async with tunnels.opened(fleet, machine.node, wanted) as (one, two):
                assert (one.moved, two.moved) == (False, True)
                assert two.requested == here
                assert two.local != here
                assert [await models(each.local) for each in (one, two)] == ["org/tiny", "org/tiny"]
            with pytest.raises(httpx.ConnectError):
                await models(one.local)

    on_a_node(tmp_path, work)


def test_a_node_that_cannot_be_entered_is_no_taken_port(tmp_path: Path) -> None:
    async def work(fleet: Fleet, machine: kit.Machine) -> None:
        machine.server.close()
        with pytest.raises(SshError, match="cannot be reached"):
            async with tunnels.opened(fleet, machine.node, [WantedPort(name="engine", remote=1, local=0)]):
                pass

    on_a_node(tmp_path, work)


def test_after_a_cut_it_is_there_again_and_both_are_said(tmp_path: Path) -> None:
    async def work(fleet: Fleet, machine: kit.Machine) -> None:
        said: list[GracefarmError | None] = []
        with openai_server.server(delay=0.2) as (url, _):
            wanted = [WantedPort(name="engine", remote=int(url.rpartition(":")[2]), local=0)]
            async with tunnels.opened(fleet, machine.node, wanted) as (one,):
                watching = asyncio.create_task(tunnels.attend(fleet, machine.node, said.append, every=0.1))
                async with CompletionServer(url=f"http://127.0.0.1:{one.local}").client() as client:
                    prompt = Prompt(model="org/tiny", text="x", max_tokens=20, to_the_end=True)
                    asking = asyncio.create_task(stream(client, prompt))
                    await asyncio.sleep(0.5)
                    await machine.switch_off()
                    assert (await asking).failure == "cut"
                    await until(lambda: bool(said))
                    assert isinstance(said[0], SshError)
                    await machine.listen()
                    await until(lambda: len(said) == 2)
                    assert said[1] is None
                    assert (await stream(client, prompt)).failure is None
                watching.cancel()

    on_a_node(tmp_path, work)


async def until(true: Callable[[], bool], seconds: float = 10) -> None:
    async with asyncio.timeout(seconds):
        while not true():  # noqa: ASYNC110 - of another task
            await asyncio.sleep(0.02)


@asynccontextmanager
async def deploy(folder: Path, *arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """The command as a person calls it, in `folder`."""
    env = {**os.environ, "HOME": str(folder / "person"), "PYTHONPATH": str(ROOT), "COLUMNS": "160"}
    (folder / "person").mkdir(exist_ok=True)
    pipe: Any = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "deploy", *arguments, cwd=folder, env=env, stdout=pipe, stderr=pipe
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def test_the_command_forwards_until_ctrl_c_and_ends_with_0(tmp_path: Path) -> None:
    async def work(fleet: Fleet, machine: kit.Machine) -> None:
        with openai_server.server() as (url, _), socket.create_server(("127.0.0.1", 0)) as other:
            kit.deployment(tmp_path, [machine], ports={"engine": int(url.rpartition(":")[2])})
            dashboard = str(other.getsockname()[1])
            async with deploy(tmp_path, "tunnel", "--json", "--port", "0", "--dashboard-port", dashboard) as process:
                assert process.stdout
                told = json.loads(await asyncio.wait_for(process.stdout.readline(), 20))
                assert told["forwards"]["dashboard"]["url"] != f"http://127.0.0.1:{dashboard}"
                assert await models(int(told["forwards"]["engine"]["url"].rpartition(":")[2])) == "org/tiny"
                process.send_signal(signal.SIGINT)
                out, err = await asyncio.wait_for(process.communicate(), 10)
                assert process.returncode == 0, err
                assert b"closed" in out

    on_a_node(tmp_path, work)


def test_in_the_background_until_it_is_ended_and_a_killed_one_is_no_trouble(tmp_path: Path) -> None:
    async def work(fleet: Fleet, machine: kit.Machine) -> None:
        with openai_server.server() as (url, _):
            made = kit.deployment(tmp_path, [machine], ports={"engine": int(url.rpartition(":")[2])})
            words = ("tunnel", "--background", "--json", "--port", "0", "--dashboard-port", "0")
            ports = []
            for _ in range(2):
                async with deploy(tmp_path, *words) as process:
                    out, err = await asyncio.wait_for(process.communicate(), 30)
                    assert process.returncode == 0, out + err
                ports.append(int(json.loads(out)["forwards"]["engine"]["local"]))
                assert await models(ports[-1]) == "org/tiny"
            first, _second = sorted((made.folder.path / "tunnels").iterdir(), key=lambda one: one.stat().st_mtime)
            os.kill(int(first.name), signal.SIGKILL)
            async with deploy(tmp_path, "tunnel", "--end") as process:
                out, err = await asyncio.wait_for(process.communicate(), 30)
                assert (process.returncode, out) == (0, b"1 tunnel closed\n"), err
            for port in ports:
                with pytest.raises(httpx.TransportError):
                    await models(port)
            assert list((made.folder.path / "tunnels").iterdir()) == []
            await machine.switch_off()
            async with deploy(tmp_path, *words) as process:
                out, err = await asyncio.wait_for(process.communicate(), 30)
                assert process.returncode == 60
                assert b"cannot be reached" in out

    on_a_node(tmp_path, work)


def test_a_number_of_another_place_is_not_ended(tmp_path: Path) -> None:
    """The folder may be on a file system that several machines share."""
    folder = Folder(path=tmp_path)
    with tunnels.registered(folder):
        (mine,) = (tmp_path / "tunnels").iterdir()
        mine.write_text("another-boot 4026531836\n")
        assert tunnels.end_all(folder) == 0  # else this very process would get the signal
    assert not mine.exists()


def test_the_bench_finds_engine_and_key_by_itself_and_keeps_what_it_found(tmp_path: Path) -> None:
    key = "gf-a-key-of-this-test"

    async def work(fleet: Fleet, machine: kit.Machine) -> None:
        with openai_server.server(key=key) as (url, _):
            made = kit.deployment(tmp_path, [machine], ports={"engine": int(url.rpartition(":")[2])})
            made.folder.api_key.write_text(key + "\n")
            async with deploy(tmp_path, "bench", "--concurrency", "1,2", "--requests", "3", "--max-tokens", "8") as process:
                out, err = await asyncio.wait_for(process.communicate(), 60)
                assert process.returncode == 0, err.decode()
            kept = sorted(path.name for path in (tmp_path / ".deploy" / "bench").iterdir())
            assert [name.rpartition(".")[2] for name in kept] == ["json"]
            report = json.loads((tmp_path / ".deploy" / "bench" / kept[0]).read_text())
            assert [level["tokens"] for level in report["levels"]] == [24, 24]
            assert "3/3" in out.decode()
            assert key not in out.decode() + err.decode() + json.dumps(report)

    on_a_node(tmp_path, work)
