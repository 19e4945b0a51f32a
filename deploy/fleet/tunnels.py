"""Forwards the ports of the engine and Ray's dashboard to this machine, through SSH to the head."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from deploy.fleet.forwarding import forward_local
from deploy.fleet.ssh import Fleet
from deploy.nodes.deployment import Deployment, Folder, Node
from gracefarm.errors import GracefarmError, HostError, SshError
from gracefarm.files import lock

LOOK = 5.0
"Seconds between checks of the connection, and between attempts to reconnect."
OnChange = Callable[[GracefarmError | None], None]
"Called with None when the connection is up again, and with the error when it is lost."


@dataclass(frozen=True, kw_only=True)
class WantedPort:
    """A port of the head's loopback, and the local port for it (0: any free port)."""

    name: str
    remote: int
    local: int


@dataclass(frozen=True, kw_only=True)
class Forward:
    """A local port that is forwarded."""

    name: str
    remote: int
    local: int
    requested: int
    "The local port that was requested; 0: any free port."

    @property
    def moved(self) -> bool:
        """Whether the requested local port was not available."""
        return self.requested not in (0, self.local)


def ports(deployment: Deployment, *, engine: int | None = None, dashboard: int | None = None) -> tuple[WantedPort, ...]:
    """The ports of the engine and of the dashboard. The local ports have the same numbers by default."""
    there = deployment.data.ports
    return (
        WantedPort(name="engine", remote=there.engine, local=there.engine if engine is None else engine),
        WantedPort(name="dashboard", remote=there.dashboard, local=there.dashboard if dashboard is None else dashboard),
    )


@asynccontextmanager
async def opened(fleet: Fleet, node: Node, wanted: Sequence[WantedPort]) -> AsyncIterator[tuple[Forward, ...]]:
    """Forward all ports of `wanted` while the context is open. A free local port replaces one that is in use.

    Raises:
        SshError: the node cannot be reached.
    """
    await fleet.connection(node)
    async with AsyncExitStack() as stack:
        forwards = []
        for port in wanted:
            try:
                local = await stack.enter_async_context(forward_local(fleet, node, port.local, port.remote))
            except SshError:  # the node was reached above, so this machine refuses the port
                local = await stack.enter_async_context(forward_local(fleet, node, 0, port.remote))
            forwards.append(Forward(name=port.name, remote=port.remote, local=local, requested=port.local))
        yield tuple(forwards)


async def attend(fleet: Fleet, node: Node, on_change: OnChange, *, every: float = LOOK) -> None:
    """Keep the connection open until cancelled, and call `on_change` when it is lost and when it is back."""
    up = True
    before = await fleet.connection(node)
    while True:
        await asyncio.sleep(every)
        try:
            now = await fleet.connection(node)
        except GracefarmError as error:
            if up:
                on_change(error)
            up = False
            continue
        if now is not before:
            on_change(None)
        before, up = now, True


@contextmanager
def registered(folder: Folder) -> Iterator[None]:
    """Register this process for `end_all`: a locked file with its process id. The kernel releases the lock when it ends."""
    path = folder.path / "tunnels" / str(os.getpid())
    with lock(path):
        path.write_text(_place())
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def end_all(folder: Folder, *, seconds: float = 10) -> int:
    """Stop all tunnels of this deployment on this machine. Return their number.

    Raises:
        HostError: a tunnel does not stop.
    """
    ended = 0
    for path in sorted((folder.path / "tunnels").glob("[0-9]*")):
        with path.open("a") as stream:
            if not _free(stream.fileno()):
                if path.read_text() != _place():
                    continue  # the process id is from another boot or namespace
                os.kill(int(path.name), signal.SIGTERM)
                ended += 1
                deadline = time.monotonic() + seconds
                while not _free(stream.fileno()):
                    if time.monotonic() > deadline:
                        raise HostError(
                            f"the tunnel (process {path.name}) did not stop within {seconds:g} s",
                            remedy=f"end the process with `kill -9 {path.name}`, then repeat the command",
                        )
                    time.sleep(0.05)
        path.unlink(missing_ok=True)
    return ended


def _free(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _place() -> str:
    """Boot and process namespace in which a process id is valid."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {Path('/proc/self/ns/pid').stat().st_ino}\n"
