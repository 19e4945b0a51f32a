"""Forwards ports of this machine to ports of a node."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import asyncssh
from asyncssh.constants import OPEN_ADMINISTRATIVELY_PROHIBITED

from deploy.fleet.ssh import Fleet
from deploy.nodes.deployment import Node
from gracefarm.errors import GracefarmError, SshError


class ForwardingError(SshError):
    """The sshd of a node allows sessions but forbids port forwarding."""


async def require_forwarding(fleet: Fleet, node: Node, port: int) -> None:
    """Check that sshd forwards to a port of the node's loopback. It does not matter whether a server listens on the port.

    Raises:
        ForwardingError: the configuration of sshd forbids it.
        SshError: the node cannot be reached.
    """
    try:
        _, writer = await fleet.channel(node, lambda connection: connection.open_connection("127.0.0.1", port, encoding=None))
        writer.close()
    except SshError as error:
        refused = error.__cause__
        if not isinstance(refused, asyncssh.ChannelOpenError):
            raise
        if refused.code == OPEN_ADMINISTRATIVELY_PROHIBITED:
            raise ForwardingError(
                f"{node.name}: sshd forbids forwarding port {port} (AllowTcpForwarding, DisableForwarding or PermitOpen)",
                remedy="set `AllowTcpForwarding local` in /etc/ssh/sshd_config on this node, reload sshd, then repeat "
                "the command",
            ) from error


@asynccontextmanager
async def forward_local(fleet: Fleet, node: Node, local_port: int, remote_port: int) -> AsyncIterator[int]:
    """Forward a port of this machine's loopback to a port of the node, and yield it; 0 selects a free port.

    The connection is reopened when it is lost.

    Raises:
        ForwardingError: the node's sshd forbids it.
        SshError: the local port is not available, or the node cannot be reached.
    """
    await fleet.connection(node)
    await require_forwarding(fleet, node, remote_port)
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        tasks.add(task)
        try:
            far_reader, far_writer = await fleet.channel(
                node, lambda connection: connection.open_connection("127.0.0.1", remote_port, encoding=None)
            )
            await asyncio.gather(_pump(reader, far_writer), _pump(far_reader, writer))
        except (GracefarmError, OSError, asyncssh.Error):
            pass  # nothing listens on the node's port; the client's connection is closed
        except asyncio.CancelledError:
            pass  # the tunnel is closed; Python 3.11's server prints a traceback for a handler that ends cancelled
        finally:
            tasks.discard(task)
            writer.close()

    try:
        server = await asyncio.start_server(serve, "127.0.0.1", local_port)
    except OSError as error:
        raise SshError(
            f"port {local_port} of this machine cannot be used: {error.strerror}",
            remedy="stop the program that uses this port, or give a different port with --port or --dashboard-port",
        ) from error
    try:
        yield int(server.sockets[0].getsockname()[1])
    finally:
        await stop_accepting(server)
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def stop_accepting(server: asyncio.Server | asyncssh.SSHAcceptor) -> None:
    """Close the listening sockets after every connection that was already accepted has reached its handler.

    Without this, `close()` loses a connection that asyncio has accepted and not yet attached to the server: its handler never
    runs, and its socket stays open (https://github.com/python/cpython/issues/109564).
    """
    loop = asyncio.get_running_loop()
    for listening in server.sockets:
        loop.remove_reader(listening.fileno())
    for _turn in ("the server attaches the connection", "its protocol starts", "the handler runs"):
        await asyncio.sleep(0)
    server.close()


async def _pump(source: Any, target: Any) -> None:
    try:
        while block := await source.read(1 << 16):
            target.write(block)
            await target.drain()
    finally:
        with suppress(OSError, asyncssh.Error):
            target.write_eof()
