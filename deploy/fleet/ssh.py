"""All nodes at once over SSH: a fleet of connections, and commands that run on them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

import asyncssh

from deploy.fleet.commands import OnLine, RunningCommand, command_line, put_down
from deploy.fleet.connections import Connections
from deploy.fleet.results import CommandResult, require, try_all
from deploy.nodes.deployment import Deployment, Node
from gracefarm.errors import GracefarmError, NodeError

LOCAL = "/tmp/gracefarm-{user}"  # noqa: S108 - jobs.sh refuses it when somebody else owns it


class Fleet(Connections):
    """Nodes that are worked on at once; `async with` closes the connections, and detached jobs go on."""

    def __init__(
        self,
        nodes: Sequence[Node],
        *,
        known_hosts: Path,
        local: str = LOCAL,
        mark: str = "adhoc",
        config: Sequence[Path] | None = None,
        connect_timeout: float = 10.0,
    ) -> None:
        super().__init__(known_hosts=known_hosts, config=config, timeout=connect_timeout)
        self.nodes = tuple(nodes)
        self.local = local
        "Folder on a node's own disk; {user} and {node} are replaced."
        self.mark = mark
        "Tells this deployment's processes and folders on the nodes from all others'."
        self._users: dict[str, str] = {}

    def pick(self, nodes: Sequence[Node | str] | None) -> tuple[Node, ...]:
        """Nodes by name or themselves; None: all."""
        if nodes is None:
            return self.nodes
        names = {node.name: node for node in self.nodes}
        return tuple(names[node] if isinstance(node, str) else node for node in nodes)

    async def connect(self, nodes: Sequence[Node | str] | None = None) -> dict[str, GracefarmError | None]:
        """Connect to nodes at once; for each None, or why not."""
        chosen = self.pick(nodes)
        _connected, lost = await try_all(chosen, self.connection)
        return {node.name: lost.get(node.name) for node in chosen}

    async def base(self, node: Node) -> str:
        """`local` on a node. Raises SshError, NodeError."""
        if "{user}" in self.local and node.name not in self._users:
            result = (await self.run(["id", "-un"], nodes=[node], timeout=30))[node.name]
            require({node.name: result}, "asking for the user")
            self._users[node.name] = result.stdout.strip()
        return self.local.format(user=self._users.get(node.name, ""), node=node.name)

    async def folder(self, node: Node) -> str:
        """This deployment's folder on the node's own disk, owned by its user; jobs make it. Raises SshError, NodeError."""
        return f"{await self.base(node)}/{self.mark}/{node.name}"

    async def run(
        self,
        command: Sequence[str] | str,
        *,
        nodes: Sequence[Node | str] | None = None,
        input: bytes | None = None,  # noqa: A002 - subprocess's word
        timeout: float | None = None,  # noqa: ASYNC109 - a time for each node, told in its Result
        on_line: OnLine | None = None,
        keep: bool = True,
    ) -> dict[str, CommandResult]:
        """A command on all nodes at once: node name to Result, in the nodes' order. Never raises for a node; `require` does.

        stdin is closed unless there is `input`. `keep` false: `on_line` alone has stdout, however much it is. Secrets go in
        `input`, never in `command`.
        """
        chosen = self.pick(nodes)
        text = command_line(command)
        data = input or b""
        results = await asyncio.gather(*(self._run(node, text, data, timeout, on_line, keep) for node in chosen))
        return {result.node.name: result for result in results}

    async def _run(
        self, node: Node, command: str, data: bytes, seconds: float | None, on_line: OnLine | None, keep: bool
    ) -> CommandResult:
        begin = time.monotonic()
        running = RunningCommand(node, on_line, keep=keep)
        error: GracefarmError | None = None
        code: int | None = None
        try:
            code = await self.attend(node, command, running, data, seconds)
        except GracefarmError as known:
            error = known
        except TimeoutError:
            error = NodeError(
                f"{node}: no end within {seconds:g} s; it was told to stop", remedy="a longer --timeout, or look there"
            )
        except (OSError, asyncssh.Error) as lost:
            error = NodeError(
                f"{node}: the connection was cut ({lost or type(lost).__name__}); the command's outcome is unknown",
                remedy="repeat the command",
            )
        if code is None and error is None:
            error = NodeError(f"{node}: the connection ended before the command did", remedy="repeat the command")
        return CommandResult(
            node=node,
            returncode=code,
            raw=bytes(running.out),
            stderr=running.err.decode(errors="replace"),
            error=error,
            seconds=time.monotonic() - begin,
        )

    async def attend(
        self, node: Node, command: str, running: RunningCommand, data: bytes = b"", seconds: float | None = None
    ) -> int | None:
        """Start a command, feed it and read it to its end; its return code. It is told to end when we leave it.

        Raises:
            SshError: not reached; TimeoutError; OSError, asyncssh.Error: the connection was lost.
        """
        async with self.slot(node):
            process = await self.channel(node, lambda connection: connection.create_process(command, encoding=None))
            try:
                async with asyncio.timeout(seconds):
                    return await running.attend(process, data)
            finally:
                await put_down(process)


def open_fleet(deployment: Deployment, *, config: Sequence[Path] | None = None, connect_timeout: float | None = None) -> Fleet:
    """A deployment's nodes, with its known_hosts, its folder on the nodes and its mark."""
    return Fleet(
        deployment.nodes,
        known_hosts=deployment.folder.known_hosts,
        local=deployment.data.local,
        mark=deployment.folder.id,
        config=config,
        connect_timeout=connect_timeout or deployment.data.options.connect_timeout,
    )
