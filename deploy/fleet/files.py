"""Files for all nodes at once, each placed whole or not at all."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import PurePosixPath

import asyncssh

from deploy.fleet.results import CommandResult
from deploy.fleet.ssh import Fleet
from deploy.nodes.deployment import Node
from gracefarm.errors import GracefarmError, NodeError


async def put_file(
    fleet: Fleet, content: bytes, remote: str, *, nodes: Sequence[Node | str] | None = None
) -> dict[str, CommandResult]:
    """Place a file on all nodes at once, whole or not at all; its folder is made (0700).

    The file is for its owner alone (0600).
    """
    target = PurePosixPath(remote)
    partial = str(target.with_name(f".{target.name}.{secrets.token_hex(6)}.part"))

    async def place(node: Node) -> CommandResult:
        begin = time.monotonic()
        problem: GracefarmError | None = None
        try:
            async with (
                fleet.slot(node),
                await fleet.channel(node, lambda connection: connection.start_sftp_client()) as sftp,
            ):
                await sftp.makedirs(str(target.parent), asyncssh.SFTPAttrs(permissions=0o700), exist_ok=True)
                await _write(sftp, content, partial, remote)
        except GracefarmError as error:
            problem = error
        except (OSError, asyncssh.Error) as error:
            problem = NodeError(f"{node}: placing {remote}: {error}", remedy=f"look there: `deploy ssh {node.name}`")
        code = None if problem else 0
        return CommandResult(node=node, returncode=code, error=problem, seconds=time.monotonic() - begin)

    return {result.node.name: result for result in await asyncio.gather(*map(place, fleet.pick(nodes)))}


async def _write(sftp: asyncssh.SFTPClient, data: bytes, partial: str, remote: str) -> None:
    try:
        async with sftp.open(partial, "xb", asyncssh.SFTPAttrs(permissions=0o600)) as stream:
            await stream.write(data)
        await sftp.chmod(partial, 0o600)
        await sftp.posix_rename(partial, remote)
    except BaseException:
        with suppress(asyncssh.Error, OSError):
            await sftp.remove(partial)
        raise
