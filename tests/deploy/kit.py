"""Nodes for the tests of the steps: real SSH servers in this process, which run real commands on this machine."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncssh

from deploy import inventory, ssh
from deploy.inventory import Deployment, Node
from deploy.worker import Done, Target
from gracefarm.errors import HostError


class Connection:
    """deploy.worker.Shell over asyncssh."""

    def __init__(self, name: str, connection: asyncssh.SSHClientConnection) -> None:
        self.name = name
        self.connection = connection
        self.commands: list[str] = []

    async def stream(self, command: str, *, stdin: bytes, on_line: Callable[[str], None]) -> Done:
        self.commands.append(command)
        try:
            async with self.connection.create_process(command, encoding=None) as process:
                process.stdin.write(stdin)
                process.stdin.write_eof()
                errors = asyncio.ensure_future(process.stderr.read())
                rest = b""
                while block := await process.stdout.read(1 << 16):
                    *lines, rest = (rest + block).split(b"\n")
                    for line in lines:
                        on_line(line.decode(errors="replace"))
                stderr = await errors
                done = await process.wait()
        except (OSError, asyncssh.Error) as error:
            raise HostError(f"{self.name}: {error}", remedy="repeat the command") from error
        return Done(
            code=done.exit_status if done.exit_status is not None else -1, stderr=bytes(stderr).decode(errors="replace")
        )


def _server(
    home: Path, extra: dict[str, str], running: list[asyncio.subprocess.Process] | None = None
) -> Callable[[asyncssh.SSHServerProcess[bytes]], object]:
    async def handle(process: asyncssh.SSHServerProcess[bytes]) -> None:
        environment = {**os.environ, **extra, "HOME": str(home), "TMPDIR": str(home)}
        child = await asyncio.create_subprocess_shell(
            process.command or "true",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=home,
            env=environment,
            start_new_session=True,
        )
        assert child.stdin
        assert child.stdout
        assert child.stderr
        _hand_on_signals(process, child)
        if running is not None:
            running.append(child)
        reading = asyncio.ensure_future(_copy(process.stdin, child.stdin))
        await asyncio.gather(_copy(child.stdout, process.stdout), _copy(child.stderr, process.stderr))
        code = await child.wait()
        reading.cancel()
        if running is not None:
            running.remove(child)
        process.exit(code if code >= 0 else 128 - code)

    return handle


def _hand_on_signals(process: asyncssh.SSHServerProcess[bytes], child: asyncio.subprocess.Process) -> None:
    """As sshd does: to the command's process group. asyncssh would raise them where stdin is read, which has ended."""

    def received(name: str) -> None:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, getattr(signal, "SIG" + name))

    process.signal_received = received  # type: ignore[method-assign]


async def _copy(source: Any, target: Any) -> None:
    with suppress(OSError, asyncssh.Error):
        while block := await source.read(1 << 16):
            target.write(block)
        if isinstance(target, asyncio.StreamWriter):
            target.close()


@asynccontextmanager
async def nodes(
    folder: Path, count: int, *, environment: dict[str, dict[str, str]] | None = None
) -> AsyncIterator[list[Target]]:
    """`count` nodes k0, k1, … on 127.0.0.11 and on, each with a home of its own, reached with a pinned host key."""
    key = asyncssh.generate_private_key("ssh-ed25519")
    servers, targets = [], []
    try:
        for index in range(count):
            name, address, home = f"k{index}", f"127.0.0.{11 + index}", folder / f"home-k{index}"
            home.mkdir()
            server = await asyncssh.create_server(
                _Open,
                address,
                0,
                server_host_keys=[key],
                process_factory=_server(home, (environment or {}).get(name, {})),
                encoding=None,
            )
            servers.append(server)
            port = server.sockets[0].getsockname()[1]
            known = asyncssh.import_known_hosts(f"[{address}]:{port} {key.export_public_key().decode()}")
            connection = await asyncssh.connect(
                address, port, known_hosts=known, username="tester", client_keys=None, config=None, agent_path=None
            )
            targets.append(Target(name=name, address=address, gpus=1, shell=Connection(name, connection)))
        yield targets
    finally:
        for one in targets:
            one.shell.connection.close()  # type: ignore[attr-defined]
            await one.shell.connection.wait_closed()  # type: ignore[attr-defined]
        for server in servers:
            server.close()
            await server.wait_closed()


class _Open(asyncssh.SSHServer):
    """Lets everybody in: these tests are about what comes after."""

    def begin_auth(self, _username: str) -> bool:
        return False

    def connection_requested(self, *_where: object) -> bool:
        return True


@dataclass
class Machine:
    """A node as the Fleet enters it, and what a test may do to it."""

    node: Node
    home: Path
    key: asyncssh.SSHKey
    server: asyncssh.SSHAcceptor = field(init=False)
    connections: list[asyncssh.SSHServerConnection] = field(default_factory=list)
    running: list[asyncio.subprocess.Process] = field(default_factory=list)
    entered: int = 0
    "Connections that were made so far."

    async def listen(self, port: int | None = None) -> None:
        """Let the Fleet in; None: at the port where it was before."""
        machine = self

        class Server(_Open):
            def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
                machine.connections.append(conn)
                machine.entered += 1

        self.server = await asyncssh.create_server(
            Server,
            self.node.address,
            self.node.port if port is None else port,
            server_host_keys=[self.key],
            process_factory=_server(self.home, {}, self.running),
            sftp_factory=True,
            allow_scp=False,
            encoding=None,
        )

    async def switch_off(self) -> None:
        """Nobody gets in any more, and whoever was in is out; its commands go on."""
        self.server.close()
        await self.server.wait_closed()
        self.cut()

    def cut(self) -> None:
        """Every connection to it ends at once, as when a cable is pulled and the other side gave up; the commands go on."""
        for one in self.connections:
            one.abort()
        self.connections.clear()


@asynccontextmanager
async def machines(folder: Path, count: int) -> AsyncIterator[list[Machine]]:
    """`count` nodes with host keys of their own, pinned in `folder`/known_hosts; commands run on this machine."""
    made: list[Machine] = []
    try:
        for index in range(count):
            home = folder / f"home-k{index}"
            home.mkdir(exist_ok=True)
            made.append(await _machine(index, home))
        ssh.pin(folder / "known_hosts", [(ssh.entry_name(one.node.address, one.node.port), one.key) for one in made])
        yield made
    finally:
        for one in made:
            one.cut()
            for child in one.running:
                with suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
            while one.running:  # noqa: ASYNC110 - their handlers take them out
                await asyncio.sleep(0.01)
            one.server.close()
            await one.server.wait_closed()


async def _machine(index: int, home: Path) -> Machine:
    node = Node(name=f"k{index}", rank=index, address=f"127.0.0.{11 + index}", user="tester")
    machine = Machine(node=node, home=home, key=asyncssh.generate_private_key("ssh-ed25519"))
    await machine.listen(0)
    machine.node = node.model_copy(update={"port": machine.server.sockets[0].getsockname()[1]})
    return machine


def mark(folder: Path) -> str:
    """A deployment's id of this test alone: two runs on one machine would end each other's jobs."""
    return "t" + hashlib.sha256(str(folder).encode()).hexdigest()[:11]


def fleet(folder: Path, made: list[Machine], **more: Any) -> Any:
    """deploy.ssh.fleet over `made`, with nobody's ~/.ssh/config."""
    local = {"known_hosts": folder / "known_hosts", "local": f"{folder}/local", "mark": mark(folder), "config": ()}
    return ssh.fleet([one.node for one in made], **{**local, **more})


def deployment(
    folder: Path, made: list[Machine], *, ports: dict[str, int] | None = None, more: str = "", local: str | None = None
) -> Deployment:
    """deploy.toml in `folder` for `made`, prepared as `deploy init` does, for commands that a test runs there."""
    place = local or folder / "local"
    text = ['name = "t"', f'local = "{place}"', more, "[ports]"]
    text += [f"{name} = {port}" for name, port in (ports or {}).items()]
    for one in made:
        text += ["[[node]]", f'address = "{one.node.address}"', f"port = {one.node.port}", 'user = "tester"']
    (folder / "deploy.toml").write_text("\n".join(text) + "\n")
    found = inventory.load(folder / "deploy.toml")
    found.folder.make()
    shutil.copy(folder / "known_hosts", found.folder.known_hosts)
    return found
