"""Nodes for the tests of the steps. They are real SSH servers in this process, and run real commands on this machine."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import shutil
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import asyncssh
from asyncssh.constants import OPEN_ADMINISTRATIVELY_PROHIBITED

from deploy.fleet.calls import RemoteNode
from deploy.fleet.forwarding import stop_accepting
from deploy.fleet.hostkeys import entry_name, pin
from deploy.fleet.shells import remote_nodes
from deploy.fleet.ssh import Fleet
from deploy.nodes.deployment import Deployment, Node, load_deployment
from deploy.remote import marked


def processes_of(
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
    """Send signals to the command's process group, like sshd. asyncssh raises them where stdin is read, and this has ended."""

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
) -> AsyncIterator[list[RemoteNode]]:
    """Start `count` nodes k0, k1, … on 127.0.0.11 and the following addresses. Each node has a separate home."""
    async with machines(folder, count, environment=environment) as made, fleet(folder, made) as entered:
        try:
            yield [replace(target, gpus=1) for target in remote_nodes(entered)]
        finally:
            # Jobs continue after the end of a connection, but they must end with the nodes.
            marked.stop({"prefixes": [f"{mark(folder)}/"], "grace": 1})


class Admitting(asyncssh.SSHServer):
    """A server that accepts every login, since these tests are not about the login."""

    def begin_auth(self, _username: str) -> bool:
        return False

    def connection_requested(self, *_where: object) -> bool:
        return True


@dataclass
class Machine:
    """A node to which the Fleet connects, and methods with which a test causes faults."""

    node: Node
    home: Path
    key: asyncssh.SSHKey
    environment: dict[str, str] = field(default_factory=dict)
    server: asyncssh.SSHAcceptor = field(init=False)
    connections: list[asyncssh.SSHServerConnection] = field(default_factory=list)
    running: list[asyncio.subprocess.Process] = field(default_factory=list)
    entered: int = 0
    "Number of connections so far."
    forwards: bool = True
    "Like AllowTcpForwarding of sshd."

    async def listen(self, port: int | None = None) -> None:
        """Accept connections. Without `port`, use the earlier port again."""
        machine = self

        class Server(Admitting):
            def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
                machine.connections.append(conn)
                machine.entered += 1

            def connection_requested(self, *_where: object) -> bool:
                if not machine.forwards:  # OpenSSH refuses with the same error
                    raise asyncssh.ChannelOpenError(OPEN_ADMINISTRATIVELY_PROHIBITED, "open failed")
                return True

        self.server = await asyncssh.create_server(
            Server,
            self.node.address,
            self.node.port if port is None else port,
            server_host_keys=[self.key],
            process_factory=processes_of(self.home, self.environment, self.running),
            sftp_factory=True,
            allow_scp=False,
            encoding=None,
        )

    async def switch_off(self) -> None:
        """Refuse new connections, and close the open ones. The commands continue."""
        await stop_accepting(self.server)
        await self.server.wait_closed()
        self.cut()

    def cut(self) -> None:
        """End every connection immediately, as after a pulled cable and a timeout of the other side. The commands continue."""
        for connection in self.connections:
            connection.abort()
        self.connections.clear()


@asynccontextmanager
async def machines(
    folder: Path, count: int, *, environment: dict[str, dict[str, str]] | None = None
) -> AsyncIterator[list[Machine]]:
    """Start `count` nodes with separate host keys, which `folder`/known_hosts pins. Commands run on this machine."""
    made: list[Machine] = []
    try:
        for index in range(count):
            home = folder / f"home-k{index}"
            home.mkdir(exist_ok=True)
            made.append(await _machine(index, home, (environment or {}).get(f"k{index}", {})))
        pin(
            folder / "known_hosts",
            [(entry_name(machine.node.address, machine.node.port), machine.key) for machine in made],
        )
        yield made
    finally:
        for machine in made:
            machine.cut()
            for child in machine.running:
                with suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
            while machine.running:  # noqa: ASYNC110 - the handlers of the processes remove them
                await asyncio.sleep(0.01)
            await stop_accepting(machine.server)
            await machine.server.wait_closed()


async def _machine(index: int, home: Path, environment: dict[str, str]) -> Machine:
    node = Node(name=f"k{index}", rank=index, address=f"127.0.0.{11 + index}", user="tester")
    machine = Machine(node=node, home=home, key=asyncssh.generate_private_key("ssh-ed25519"), environment=environment)
    await machine.listen(0)
    machine.node = node.model_copy(update={"port": machine.server.sockets[0].getsockname()[1]})
    return machine


def mark(folder: Path) -> str:
    """A separate id of the deployment for each test, so that two runs on one machine do not stop each other's jobs."""
    return "t" + hashlib.sha256(str(folder).encode()).hexdigest()[:11]


def fleet(folder: Path, made: list[Machine], **more: Any) -> Any:
    """A Fleet over `made`, without a ~/.ssh/config."""
    local = {"known_hosts": folder / "known_hosts", "local": f"{folder}/local", "mark": mark(folder), "config": ()}
    return Fleet([machine.node for machine in made], **{**local, **more})


def deployment(
    folder: Path, made: list[Machine], *, ports: dict[str, int] | None = None, more: str = "", local: str | None = None
) -> Deployment:
    """Write deploy.toml in `folder` for the nodes `made`, like `deploy init`. A test runs commands in this folder."""
    place = local or folder / "local"
    text = ['name = "t"', f'local = "{place}"', more, "[ports]"]
    text += [f"{name} = {port}" for name, port in (ports or {}).items()]
    for machine in made:
        text += ["[[node]]", f'address = "{machine.node.address}"', f"port = {machine.node.port}", 'user = "tester"']
    (folder / "deploy.toml").write_text("\n".join(text) + "\n")
    found = load_deployment(folder / "deploy.toml")
    found.folder.make()
    shutil.copy(folder / "known_hosts", found.folder.known_hosts)
    return found


def shards(count: int, size: int, *, seed: int = 1) -> dict[str, bytes]:
    """A repository like that of Llama: `count` shards of about `size` bytes, small files, and files that no engine reads."""
    source = random.Random(seed)
    files = {
        f"model-{number:05}-of-{count:05}.safetensors": source.randbytes(round(size * source.uniform(0.8, 1.2)))
        for number in range(1, count + 1)
    }
    return {
        **files,
        "config.json": b'{"architectures": ["LlamaForCausalLM"]}\n',
        "tokenizer.json": source.randbytes(2000),
        "original/consolidated.00.pth": b"not wanted",
        "original/params.json": b"{}",
        ".gitattributes": b"*.safetensors filter=lfs\n",
    }
