"""SSH servers in a separate thread, for commands with an event loop. They run real commands on this machine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncssh

from tests.deploy import kit


class _Way(kit.Admitting):
    """A server that is also a jump host."""

    def __init__(self, tunnels: list[tuple[str, int]]) -> None:
        self.tunnels = tunnels

    def connection_requested(self, dest_host: str, dest_port: int, _orig_host: str, _orig_port: int) -> bool:
        self.tunnels.append((dest_host, dest_port))
        return True


@dataclass
class Servers:
    """Servers at `addresses`, which all listen on `port`. Each has a separate host key."""

    addresses: list[str]
    port: int = 0
    keys: dict[str, asyncssh.SSHKey] = field(default_factory=dict)
    running: dict[str, Any] = field(default_factory=dict)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)
    folder: Path = Path()
    tunnels: list[tuple[str, int]] = field(default_factory=list)
    "The destinations of connections through a server as jump host."

    async def start(self, address: str) -> None:
        """Listen at an address, with a new host key."""
        key = self.keys[address] = asyncssh.generate_private_key("ssh-ed25519")
        home = self.folder / address
        home.mkdir(exist_ok=True)
        options: Any = {"server_host_keys": [key], "process_factory": kit.processes_of(home, {}), "encoding": None}
        server = await asyncssh.create_server(lambda: _Way(self.tunnels), address, self.port, **options)
        self.port = server.sockets[0].getsockname()[1]
        self.running[address] = server

    async def stop(self, address: str) -> None:
        """Stop listening at an address."""
        server = self.running.pop(address)
        server.close()
        await server.wait_closed()

    def do(self, work: Any) -> None:
        """Run `start` or `stop` in the servers' thread."""
        asyncio.run_coroutine_threadsafe(work, self.loop).result(30)


@contextmanager
def servers(folder: Path, count: int) -> Iterator[Servers]:
    """Run `count` servers on 127.0.0.21 and the following addresses."""
    made = Servers(addresses=[f"127.0.0.{21 + index}" for index in range(count)], folder=folder)
    thread = threading.Thread(target=made.loop.run_forever)
    thread.start()
    try:
        for address in made.addresses:
            made.do(made.start(address))
        yield made
    finally:
        for address in list(made.running):
            made.do(made.stop(address))
        made.loop.call_soon_threadsafe(made.loop.stop)
        thread.join()
        made.loop.close()
