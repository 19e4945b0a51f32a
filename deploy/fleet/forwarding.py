"""Ports of this machine that lead to a node's."""

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
    """The node's sshd lets a session in and forwards no port."""


async def require_forwarding(fleet: Fleet, node: Node, port: int) -> None:
    """Whether sshd forwards to a port of the node's loopback; whether anything listens there is another question.

    Raises:
        ForwardingError: its configuration forbids it; SshError: the node cannot be entered.
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
                f"{node.name}: its sshd forbids to forward port {port} (AllowTcpForwarding, DisableForwarding or PermitOpen)",
                remedy="set `AllowTcpForwarding local` in /etc/ssh/sshd_config there, reload sshd, then repeat the command",
            ) from error


@asynccontextmanager
async def forward_local(fleet: Fleet, node: Node, local_port: int, remote_port: int) -> AsyncIterator[int]:
    """A port of this machine's loopback that leads to one of the node's; 0 takes a free one. Yields it.

    It connects again after a cut.
    Raises:
        ForwardingError: the node's sshd forbids it; SshError: the port is taken here, or the node cannot be entered.
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
            pass  # nobody listens there now; the client sees its connection closed
        except asyncio.CancelledError:
            pass  # the tunnel is taken down; Python 3.11's server prints a traceback for a handler that ends cancelled
        finally:
            tasks.discard(task)
            writer.close()

    try:
        server = await asyncio.start_server(serve, "127.0.0.1", local_port)
    except OSError as error:
        raise SshError(
            f"port {local_port} of this machine: {error.strerror}", remedy="another --port; 0 takes a free one"
        ) from error
    try:
        yield int(server.sockets[0].getsockname()[1])
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(source: Any, target: Any) -> None:
    try:
        while block := await source.read(1 << 16):
            target.write(block)
            await target.drain()
    finally:
        with suppress(OSError, asyncssh.Error):
            target.write_eof()
