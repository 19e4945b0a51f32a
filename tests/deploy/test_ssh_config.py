"""A person's ~/.ssh/config: name, port, user, key and jump host come from there, for init, run, files and jobs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncssh
import pytest

from deploy.fleet.files import put_file
from deploy.fleet.jobs import follow_job, start_job
from deploy.fleet.shells import remote_nodes
from deploy.fleet.ssh import open_fleet
from deploy.nodes.deployment import load_deployment
from tests.deploy import kit
from tests.deploy.test_init import deploy

BEHIND = "big-one.behind-the-gate.invalid"


@dataclass
class Door:
    """An SSH server that lets one user in with one key, and remembers who came and where they went on to."""

    address: str
    user: str
    key: asyncssh.SSHKey = field(default_factory=lambda: asyncssh.generate_private_key("ssh-ed25519"))
    host_key: asyncssh.SSHKey = field(default_factory=lambda: asyncssh.generate_private_key("ssh-ed25519"))
    port: int = 0
    came: list[str] = field(default_factory=list)
    went: list[str] = field(default_factory=list)
    behind: tuple[str, int] = ("", 0)
    "Its destination; only this file knows that name."

    async def open(self, home: Path) -> asyncssh.SSHAcceptor:
        door = self

        class Server(asyncssh.SSHServer):
            def begin_auth(self, username: str) -> bool:
                self.user = username
                return True

            def public_key_auth_supported(self) -> bool:
                return True

            def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
                return username == door.user and key.public_data == door.key.public_data

            def auth_completed(self) -> None:
                door.came.append(self.user)

            def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
                self.connection = conn

            def connection_requested(self, dest_host: str, _dest_port: int, _orig_host: str, _orig_port: int) -> Any:
                door.went.append(dest_host)
                return self.connection.forward_connection(*door.behind)

        options: Any = {"server_host_keys": [self.host_key], "process_factory": kit.processes_of(home, {}), "encoding": None}
        server = await asyncssh.create_server(Server, self.address, 0, sftp_factory=True, allow_scp=False, **options)
        self.port = server.sockets[0].getsockname()[1]
        return server


@pytest.fixture
def doors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Door, Door]]:
    """A node behind a gate, as ~/.ssh/config of HOME has them."""
    node, gate = Door("127.0.0.31", "worker"), Door("127.0.0.32", "porter")
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    for server in (node, gate):
        (tmp_path / server.user).mkdir()
    opened = [
        asyncio.run_coroutine_threadsafe(server.open(tmp_path / server.user), loop).result(30) for server in (node, gate)
    ]
    gate.behind = (node.address, node.port)
    own = tmp_path / "home" / ".ssh"
    own.mkdir(parents=True, mode=0o700)
    for server in (node, gate):
        (own / f"key-{server.user}").write_bytes(server.key.export_private_key())
        (own / f"key-{server.user}").chmod(0o600)
    (own / "config").write_text(
        f"Host big-one\n  HostName {BEHIND}\n  Port {node.port}\n  User worker\n  IdentityFile {own}/key-worker\n"
        f"  IdentitiesOnly yes\n  ProxyJump gate\n"
        f"Host gate\n  HostName {gate.address}\n  Port {gate.port}\n  User porter\n  IdentityFile {own}/key-porter\n"
    )
    (own / "known_hosts").write_text(f"[{gate.address}]:{gate.port} {gate.host_key.export_public_key().decode()}")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    (tmp_path / "ips.txt").write_text("big-one\n")
    try:
        yield node, gate
    finally:
        for server in opened:
            loop.call_soon_threadsafe(server.close)
            asyncio.run_coroutine_threadsafe(server.wait_closed(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def test_a_name_of_the_configuration_is_all_that_a_person_says(tmp_path: Path, doors: tuple[Door, Door]) -> None:
    node, gate = doors
    done = deploy(tmp_path, "init", "ips.txt")
    assert done.returncode == 60
    assert node.host_key.get_fingerprint() in done.stderr
    done = deploy(tmp_path, "init", "ips.txt", "--accept")
    assert done.returncode == 0, done.stderr
    assert set(node.came) == {"worker"}
    assert set(gate.came) == {"porter"}
    assert set(gate.went) == {BEHIND}
    deployment = load_deployment(tmp_path / "deploy.toml")
    assert (deployment.head.user, deployment.head.key, deployment.head.port, deployment.head.jump) == (None, None, 22, None)

    came = len(gate.came)
    done = deploy(tmp_path, "run", "--", "echo at ${HOME##*/}")
    assert (done.returncode, done.stdout) == (0, "k0 at worker\n")
    assert len(gate.came) > came

    async def place() -> list[str]:
        lines: list[str] = []
        data = deployment.data.model_copy(update={"local": str(tmp_path / "local")})
        async with open_fleet(deployment.model_copy(update={"data": data})) as fleet:
            await put_file(remote_nodes(fleet)[0], b"content", str(tmp_path / "placed"))
            await start_job(fleet, deployment.head, "hello", ["echo", "from a job"])
            await follow_job(fleet, deployment.head, "hello", lines.append)
        return lines

    assert asyncio.run(place()) == ["from a job"]
    assert (tmp_path / "placed").read_bytes() == b"content"


def test_what_deploy_toml_says_comes_before_the_configuration(tmp_path: Path, doors: tuple[Door, Door]) -> None:
    node, _gate = doors
    done = deploy(tmp_path, "init", "ips.txt", "--accept", "--user", "alice")
    assert done.returncode == 60
    assert "refuses the key" in done.stderr
    assert node.came == []


def test_a_jump_host_that_is_not_the_one_you_know_is_refused(tmp_path: Path, doors: tuple[Door, Door]) -> None:
    _node, gate = doors
    other = asyncssh.generate_private_key("ssh-ed25519").export_public_key().decode()
    (tmp_path / "home" / ".ssh" / "known_hosts").write_text(f"[{gate.address}]:{gate.port} {other}")
    done = deploy(tmp_path, "init", "ips.txt", "--accept")
    assert done.returncode == 60
    assert "host key" in done.stderr.lower()
    assert "Traceback" not in done.stderr
    assert gate.came == []
