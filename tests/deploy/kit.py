"""Nodes for the tests of the steps: real SSH servers in this process, which run real commands on this machine."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import asyncssh

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


def _server(home: Path, extra: dict[str, str]) -> Callable[[asyncssh.SSHServerProcess[bytes]], object]:
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
        reading = asyncio.ensure_future(_copy(process.stdin, child.stdin))
        await asyncio.gather(_copy(child.stdout, process.stdout), _copy(child.stderr, process.stderr))
        code = await child.wait()
        reading.cancel()
        process.exit(code if code >= 0 else 128 - code)

    return handle


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
