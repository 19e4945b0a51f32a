"""The engine and Ray's dashboard on this machine's loopback, through SSH to the head; connected again after a cut."""

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
"Seconds between two looks at the connection, and between two tries to make it again."
OnChange = Callable[[GracefarmError | None], None]
"None: connected (again); else why not."


@dataclass(frozen=True, kw_only=True)
class WantedPort:
    """A port of the head's loopback, and which one it should be here (0: any)."""

    name: str
    remote: int
    local: int


@dataclass(frozen=True, kw_only=True)
class Forward:
    """A port here that leads there."""

    name: str
    remote: int
    local: int
    moved: bool
    "The wanted one was taken here."


def ports(deployment: Deployment, *, engine: int | None = None, dashboard: int | None = None) -> tuple[WantedPort, ...]:
    """The tutorial's two, the same numbers here unless others are wanted."""
    there = deployment.data.ports
    return (
        WantedPort(name="engine", remote=there.engine, local=there.engine if engine is None else engine),
        WantedPort(name="dashboard", remote=there.dashboard, local=there.dashboard if dashboard is None else dashboard),
    )


@asynccontextmanager
async def opened(fleet: Fleet, node: Node, wanted: Sequence[WantedPort]) -> AsyncIterator[tuple[Forward, ...]]:
    """Every port of `wanted`, for as long as the context lasts. One that is taken here gets a free one instead.

    Raises:
        SshError: the node cannot be entered.
    """
    await fleet.connection(node)
    async with AsyncExitStack() as stack:
        forwards = []
        for port in wanted:
            try:
                local = await stack.enter_async_context(forward_local(fleet, node, port.local, port.remote))
            except SshError:  # the node was entered above: it is the port
                local = await stack.enter_async_context(forward_local(fleet, node, 0, port.remote))
            moved = port.local not in (0, local)
            forwards.append(Forward(name=port.name, remote=port.remote, local=local, moved=moved))
        yield tuple(forwards)


async def attend(fleet: Fleet, node: Node, on_change: OnChange, *, every: float = LOOK) -> None:
    """Keep the connection up for ever, and say when it is lost and when it is back. Cancel it to end."""
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
    """Known to `end_all` while it lasts: a locked file with this process's number, unlocked by the kernel when it dies."""
    path = folder.path / "tunnels" / str(os.getpid())
    with lock(path):
        path.write_text(_place())
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def end_all(folder: Folder, *, seconds: float = 10) -> int:
    """End every tunnel of this deployment on this machine; how many there were.

    Raises:
        HostError: one does not end.
    """
    ended = 0
    for path in sorted((folder.path / "tunnels").glob("[0-9]*")):
        with path.open("a") as stream:
            if not _free(stream.fileno()):
                if path.read_text() != _place():
                    continue  # its number means another process here
                os.kill(int(path.name), signal.SIGTERM)
                ended += 1
                deadline = time.monotonic() + seconds
                while not _free(stream.fileno()):
                    if time.monotonic() > deadline:
                        raise HostError(f"the tunnel, process {path.name}, does not end", remedy=f"kill -9 {path.name}")
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
    """Where a process's number means what it means here: this boot of this machine, this process namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {Path('/proc/self/ns/pid').stat().st_ino}\n"
