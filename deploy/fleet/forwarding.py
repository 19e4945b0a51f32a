"""Ports of this machine that lead to a node's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import asyncssh

from deploy.fleet.ssh import Fleet
from deploy.nodes.deployment import Node
from gracefarm.errors import GracefarmError, SshError


@asynccontextmanager
async def forward_local(fleet: Fleet, node: Node, local_port: int, remote_host: str, remote_port: int) -> AsyncIterator[int]:
    """A port on 127.0.0.1 here that leads to one there; 0 takes a free one. Yields it. Connects again after a cut.

    Raises:
        SshError: the port is taken here, or the node cannot be entered.
    """
    await fleet.connection(node)
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        tasks.add(task)
        try:
            far_reader, far_writer = await fleet.channel(
                node, lambda connection: connection.open_connection(remote_host, remote_port, encoding=None)
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
