"""deploy.fleet over real SSH servers: keys, exit codes, time-outs, files, jobs that outlive a cut, tunnels."""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import socket
import stat
import subprocess
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import asyncssh
import pytest

from deploy.fleet import commands
from deploy.fleet.calls import call
from deploy.fleet.files import put_file
from deploy.fleet.forwarding import forward_local
from deploy.fleet.hostkeys import entry_name, matches, pin, scan
from deploy.fleet.jobs import follow_job, job_status, start_job, stop_job
from deploy.fleet.results import require
from deploy.fleet.shells import remote_nodes
from deploy.fleet.ssh import Fleet
from deploy.nodes.deployment import Node
from gracefarm.errors import DiskFullError, NodeError, SshError, UsageError
from tests.deploy import kit

Work = Callable[[Fleet, list[kit.Machine]], Awaitable[None]]


def with_fleet(folder: Path, count: int, work: Work, **more: object) -> None:
    async def go() -> None:
        async with kit.machines(folder, count) as made, kit.fleet(folder, made, **more) as fleet:
            await work(fleet, made)

    asyncio.run(go())


def test_a_command_runs_on_all_nodes_at_once_and_every_exit_code_is_kept(tmp_path: Path) -> None:
    async def work(fleet: Fleet, made: list[kit.Machine]) -> None:
        said: list[tuple[str, str, str]] = []
        begin = time.monotonic()
        done = await fleet.run(
            'sleep 0.5; echo "at $HOME"; echo oops >&2; exit ${HOME##*-k}',
            on_line=lambda node, stream, line: said.append((node.name, stream, line)),
        )
        assert time.monotonic() - begin < 1.4  # one after the other would be 2 s
        assert [result.returncode for result in done.values()] == [0, 1, 2, 3]
        assert list(done) == ["k0", "k1", "k2", "k3"]
        assert done["k2"].stdout == f"at {made[2].home}\n"
        assert ("k3", "stderr", "oops") in said
        assert all(machine.entered == 1 for machine in made)
        with pytest.raises(NodeError, match=r"trying: exit code 1 on k1 127\.0\.0\.12: oops \(and on 2 more: k2, k3\)"):
            require(done, "trying")

    with_fleet(tmp_path, 4, work)


def test_output_that_is_read_line_by_line_may_be_any_amount_and_what_is_kept_may_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "LIMIT", 1 << 20)
    much = "yes 0123456789abcde | head -n 200000; echo end >&2; exit 3"  # 3.2 MB

    async def work(fleet: Fleet, _made: list[kit.Machine]) -> None:
        lines: list[str] = []
        (done,) = (await fleet.run(much, on_line=lambda _node, _stream, line: lines.append(line), keep=False)).values()
        assert (done.returncode, done.error, done.raw, done.stderr) == (3, None, b"", "end\n")
        assert sorted(lines) == ["0123456789abcde"] * 200_000 + ["end"]
        lines.clear()
        node = remote_nodes(fleet)[0]
        assert (await node.shell.stream(much, stdin=b"", on_line=lines.append)).code == 3
        assert len(lines) == 200_000
        (kept,) = (await fleet.run(much)).values()
        assert kept.error
        assert "stdout of the command is larger than 1 MiB" in kept.error.cause
        endless = "yes | head -c 3000000 | tr -d '\\n'"
        (line,) = (await fleet.run(endless, on_line=lambda *_: None, keep=False)).values()
        assert line.error
        assert "stdout of the command is larger than 1 MiB" in line.error.cause

    with_fleet(tmp_path, 1, work)


def test_a_signal_is_an_exit_code_and_stdin_is_closed(tmp_path: Path) -> None:
    async def work(fleet: Fleet, _made: list[kit.Machine]) -> None:
        assert (await fleet.run("kill -KILL $$"))["k0"].returncode == 137
        assert (await fleet.run("cat; echo end", timeout=20))["k0"].stdout == "end\n"
        assert (await fleet.run(["cat"], input=b"word\0"))["k0"].raw == b"word\0"

    with_fleet(tmp_path, 1, work)


def test_a_command_that_takes_too_long_is_ended_there(tmp_path: Path) -> None:
    async def work(fleet: Fleet, made: list[kit.Machine]) -> None:
        done = (await fleet.run("echo $$; sleep 300; true", timeout=1))["k0"]
        assert done.returncode is None
        assert done.error
        assert "timed out after 1 s" in done.error.cause
        await gone(int(done.stdout))

    with_fleet(tmp_path, 1, work)


async def gone(pid: int, seconds: float = 5) -> None:
    end = time.monotonic() + seconds
    while Path(f"/proc/{pid}").exists():  # noqa: ASYNC240
        assert time.monotonic() < end, f"process {pid} still runs"
        await asyncio.sleep(0.05)


def test_the_environment_and_input_are_in_no_argument_list(tmp_path: Path) -> None:
    async def work(fleet: Fleet, made: list[kit.Machine]) -> None:
        node = made[0].node
        lines: list[str] = []
        script = 'echo "$WORD"; cat; sleep 1'
        env = {"WORD": "S3CR3T-word with blanks"}
        assert await start_job(fleet, node, "secrets", script, env=env, input=b"S3CR3T-input\n")
        seen = (await fleet.run("cat /proc/[0-9]*/cmdline; cat", input=b"QX-secret"))["k0"]
        assert b"S3CR3T" not in seen.raw
        assert seen.raw.count(b"QX-secret") == 1  # its own input
        await follow_job(fleet, node, "secrets", lines.append)
        assert lines == ["S3CR3T-word with blanks", "S3CR3T-input"]
        with pytest.raises(UsageError):
            await start_job(fleet, node, "more", "true", env={"A": "two\nlines"})

    with_fleet(tmp_path, 1, work)


def test_another_host_key_is_refused_by_name_and_nothing_runs(tmp_path: Path) -> None:
    async def work(fleet: Fleet, made: list[kit.Machine]) -> None:
        other = asyncssh.generate_private_key("ssh-ed25519")
        pin(tmp_path / "known_hosts", [(entry_name(made[1].node.address, made[1].node.port), other)])
        done = await fleet.run("touch $HOME/was-here")
        assert done["k0"].ok
        assert isinstance(done["k1"].error, SshError)
        assert "the host key differs from the pinned key" in done["k1"].error.cause
        assert "deploy init --repin" in done["k1"].error.remedy
        assert not (made[1].home / "was-here").exists()

    with_fleet(tmp_path, 2, work)


def test_without_pinned_keys_nobody_is_entered(tmp_path: Path) -> None:
    async def work(fleet: Fleet, made: list[kit.Machine]) -> None:
        (tmp_path / "known_hosts").unlink()
        done = (await fleet.run("true"))["k0"]
        assert done.error
        assert "the host keys of the nodes are not stored yet" in done.error.cause
        assert made[0].entered == 0

    with_fleet(tmp_path, 1, work)


def test_a_node_that_is_away_does_not_hold_the_others_up(tmp_path: Path) -> None:
    async def go() -> None:
        async with kit.machines(tmp_path, 2) as made:
            silent = socket.create_server(("127.0.0.99", 0))  # takes the connection and says nothing
            nodes = [
                made[0].node,
                Node(name="gone", rank=1, address="127.0.0.98", port=1),
                Node(name="mute", rank=2, address="127.0.0.99", port=silent.getsockname()[1]),
                made[1].node,
            ]
            async with Fleet(nodes, known_hosts=tmp_path / "known_hosts", config=(), connect_timeout=1.5) as fleet:
                begin = time.monotonic()
                done = await fleet.run("echo hi")
                assert time.monotonic() - begin < 4
            silent.close()
        assert [result.ok for result in done.values()] == [True, False, False, True]
        assert done["gone"].error
        assert "gone 127.0.0.98:1 cannot be reached" in done["gone"].error.cause
        assert done["mute"].error
        assert "no answer" in done["mute"].error.cause

    asyncio.run(go())


def test_a_connection_that_died_is_made_again(tmp_path: Path) -> None:
    async def work(fleet: Fleet, made: list[kit.Machine]) -> None:
        assert (await fleet.run("true"))["k0"].ok
        made[0].cut()
        assert (await fleet.run("true"))["k0"].ok
        assert made[0].entered == 2

    with_fleet(tmp_path, 1, work)


def test_a_cut_in_the_middle_of_a_command_is_told_as_an_unknown_outcome(tmp_path: Path) -> None:
    async def work(fleet: Fleet, made: list[kit.Machine]) -> None:
        running = asyncio.ensure_future(fleet.run("sleep 5"))
        await asyncio.sleep(0.7)
        made[0].cut()
        done = (await asyncio.wait_for(running, 4))["k0"]
        assert done.returncode is None
        assert done.error
        step = asyncio.ensure_future(remote_nodes(fleet)[0].shell.stream("sleep 5", stdin=b"", on_line=print))
        await asyncio.sleep(0.7)
        made[0].cut()
        with pytest.raises(NodeError, match="outcome is unknown"):  # no refusal of the node's, as steps take HostError for
            await asyncio.wait_for(step, 4)

    with_fleet(tmp_path, 1, work)


def test_a_file_is_placed_whole_with_its_mode(tmp_path: Path) -> None:
    async def work(fleet: Fleet, made: list[kit.Machine]) -> None:
        remote = f"{tmp_path}/there/deep/secret"
        await put_file(remote_nodes(fleet)[0], b"x" * 100_000, remote)
        assert look(Path(remote)) == ("-rw-------", "drwx------", ["secret"])
        assert (await fleet.run(["wc", "-c", remote], nodes=["k0"]))["k0"].stdout.startswith("100000 ")
        assert made[0].entered == 1
        assert made[1].entered == 0

    with_fleet(tmp_path, 2, work)


@pytest.mark.root
def test_a_full_disk_is_told_with_its_path_and_node_whatever_needed_the_room(tmp_path: Path) -> None:
    """A file, a job and a worker: none of them ends in words of sftp, of a shell or of Python."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "full", str(disk)], check=True)

    async def work(fleet: Fleet, made: list[kit.Machine]) -> None:
        del made
        node = remote_nodes(fleet)[1]
        (disk / "kept").mkdir()
        (disk / "filled").write_bytes(b"x" * 240_000)
        with pytest.raises(DiskFullError, match=f"^k1: no space left on {disk}/kept") as error:
            await put_file(node, b"x" * 100_000, f"{disk}/kept/ray-token")
        assert "df -h" in error.value.remedy
        assert [path.name for path in (disk / "kept").iterdir()] == []
        with suppress(OSError):
            (disk / "rest").write_bytes(b"x" * 100_000)
        fleet.local = str(disk)
        with pytest.raises(DiskFullError, match=f"^k1: no space left on {disk}/"):
            await start_job(fleet, fleet.nodes[1], "engine", "true")
        with pytest.raises(DiskFullError, match=f"^k1: no space left on {disk}/worker"):
            await call(node, "facts.probe", {}, python=str(worker))

    worker = tmp_path / "worker"
    worker.write_text(
        f"#!/bin/sh\ndd if=/dev/zero of={disk}/worker status=none\n"
    )  # as a library that writes where there is no room
    worker.chmod(0o755)
    try:
        with_fleet(tmp_path, 2, work)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def look(place: Path) -> tuple[str, str, list[str]]:
    return (
        stat.filemode(place.stat().st_mode),
        stat.filemode(place.parent.stat().st_mode),
        [path.name for path in place.parent.iterdir()],
    )


def test_a_job_outlives_the_connection_and_is_followed_without_loss_or_repetition(tmp_path: Path) -> None:
    lines: list[str] = []

    async def work(fleet: Fleet, made: list[kit.Machine]) -> None:
        node = made[0].node
        command = (
            'read word; i=0; while [ $i -lt 60 ]; do echo "$word $i $EXTRA"; i=$((i+1)); sleep 0.05; done; printf last; exit 7'
        )
        assert await start_job(fleet, node, "count", command, env={"EXTRA": "e"}, input=b"line\n")
        assert not await start_job(fleet, node, "count", "echo other")  # runs already: not touched
        assert (await job_status(fleet, node, "count")).state == "running"
        following = asyncio.ensure_future(follow_job(fleet, node, "count", lines.append))
        for _ in range(4):
            await asyncio.sleep(0.5)
            made[0].cut()
        status = await asyncio.wait_for(following, 15)
        assert status.state == "exited"
        assert status.returncode == 7
        assert lines == [*(f"line {n} e" for n in range(60)), "last"]
        assert made[0].entered >= 3

    with_fleet(tmp_path, 1, work)


def test_a_job_is_found_again_by_the_next_fleet_and_stopped_with_all_its_children(tmp_path: Path) -> None:
    async def first(fleet: Fleet, made: list[kit.Machine]) -> None:
        # one child in its own session that ignores TERM: found by its mark, ended by KILL
        stubborn = "setsid sh -c 'trap \"\" TERM; echo stubborn $$; while :; do sleep 0.2; done' & echo leader $$; wait"
        await start_job(fleet, made[0].node, "many", stubborn)
        while (await job_status(fleet, made[0].node, "many")).size < 20:  # noqa: ASYNC110
            await asyncio.sleep(0.05)

    async def second(fleet: Fleet, made: list[kit.Machine]) -> None:
        node = made[0].node
        assert (await job_status(fleet, node, "many")).state == "running"
        log = Path(await fleet.folder(node)) / "jobs" / "many" / "log"
        pids = [int(line.split()[1]) for line in log.read_text().splitlines()]
        assert len(pids) == 2
        await stop_job(fleet, node, "many", grace=1)
        for pid in pids:
            await gone(pid)
        assert (await job_status(fleet, node, "many")).state == "stopped"
        await stop_job(fleet, node, "many")
        assert (await job_status(fleet, node, "never")).state == "absent"

    with_fleet(tmp_path, 1, first)
    with_fleet(tmp_path, 1, second)


def test_a_job_that_was_killed_is_lost_and_its_log_remains(tmp_path: Path) -> None:
    async def work(fleet: Fleet, made: list[kit.Machine]) -> None:
        node = made[0].node
        await start_job(fleet, node, "victim", "echo here; sleep 100")
        status = await job_status(fleet, node, "victim")
        assert status.pid
        os.killpg(status.pid, 9)
        await gone(status.pid)
        lines: list[str] = []
        assert (await follow_job(fleet, node, "victim", lines.append)).state == "lost"
        assert lines == ["here"]

    with_fleet(tmp_path, 1, work)


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    async def work(fleet: Fleet, made: list[kit.Machine]) -> None:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "local").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(NodeError, match="belongs to another user"):
            await start_job(fleet, made[0].node, "x", "true")

    with_fleet(tmp_path, 1, work)


def test_a_tunnel_survives_a_cut_and_closes_what_nobody_answers(tmp_path: Path) -> None:
    async def work(fleet: Fleet, made: list[kit.Machine]) -> None:
        async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"> " + await reader.readline())
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with forward_local(fleet, made[0].node, 0, port) as local:
            assert await ask(local) == b"> hello\n"
            made[0].cut()
            assert await ask(local) == b"> hello\n"
            server.close()
            await server.wait_closed()
            assert await ask(local) == b""
            assert made[0].entered == 2  # a refused port is not a reason to enter the node again
        with pytest.raises(OSError):
            await ask(local)

    with_fleet(tmp_path, 1, work)


@pytest.mark.parametrize("turns", range(6))
def test_a_tunnel_that_closes_while_a_client_connects_leaves_no_socket_open(tmp_path: Path, turns: int) -> None:
    async def work(fleet: Fleet, made: list[kit.Machine]) -> None:
        async with forward_local(fleet, made[0].node, 0, 1) as local:
            client = socket.create_connection(("127.0.0.1", local))
            for _ in range(turns):
                await asyncio.sleep(0)
        with client, suppress(ConnectionResetError):
            client.settimeout(5)
            assert client.recv(1) == b""

    with_fleet(tmp_path, 1, work)
    gc.collect()  # an open socket that nothing refers to is a ResourceWarning, and pytest fails


async def ask(port: int) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"hello\n")
    try:
        return await asyncio.wait_for(reader.read(), 5)
    except ConnectionError:
        return b""
    finally:
        writer.close()


def test_a_jump_host_is_one_connection_for_all_behind_it(tmp_path: Path) -> None:
    async def go() -> None:
        async with kit.machines(tmp_path, 3) as made:
            door = made[0].node
            behind = [machine.node.model_copy(update={"jump": f"tester@{door.address}:{door.port}"}) for machine in made[1:]]
            async with Fleet(behind, known_hosts=tmp_path / "known_hosts", config=()) as fleet:
                done = await fleet.run("echo ${HOME##*-}")
        assert [result.stdout for result in done.values()] == ["k1\n", "k2\n"]
        assert made[0].entered == 1

    asyncio.run(go())


def test_what_a_person_sees_of_a_host_key_is_what_gets_pinned(tmp_path: Path) -> None:
    async def work(fleet: Fleet, made: list[kit.Machine]) -> None:
        name, key = await scan(fleet, made[0].node)
        assert key.public_data == made[0].key.public_data
        assert matches(tmp_path / "known_hosts", name, key)
        shutil.copy(tmp_path / "known_hosts", tmp_path / "other")
        pin(tmp_path / "other", [(name, made[1].key)])
        assert not matches(tmp_path / "other", name, key)
        assert stat.filemode((tmp_path / "other").stat().st_mode) == "-rw-------"

    with_fleet(tmp_path, 2, work)
