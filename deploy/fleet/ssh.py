"""A fleet: SSH connections to all nodes, and commands that run on them in parallel."""

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

LOCAL = "/tmp/gracefarm-{user}"  # noqa: S108 - jobs.sh refuses it if another user owns it


class Fleet(Connections):
    """Nodes that run commands in parallel. `async with` closes the connections; detached jobs continue."""

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
        "Folder on a node's local disk; {user} and {node} are replaced."
        self.mark = mark
        "Identifies the processes and folders of this deployment on the nodes."
        self._users: dict[str, str] = {}

    def pick(self, nodes: Sequence[Node | str] | None) -> tuple[Node, ...]:
        """The given nodes; names are replaced by their nodes. None: all nodes."""
        if nodes is None:
            return self.nodes
        names = {node.name: node for node in self.nodes}
        return tuple(names[node] if isinstance(node, str) else node for node in nodes)

    async def connect(self, nodes: Sequence[Node | str] | None = None) -> dict[str, GracefarmError | None]:
        """Connect to nodes in parallel. For each name: None, or the error."""
        chosen = self.pick(nodes)
        _connected, lost = await try_all(chosen, self.connection)
        return {node.name: lost.get(node.name) for node in chosen}

    async def base(self, node: Node) -> str:
        """The folder `local` of a node. Raises SshError, NodeError."""
        if "{user}" in self.local and node.name not in self._users:
            result = (await self.run(["id", "-un"], nodes=[node], timeout=30))[node.name]
            require({node.name: result}, "looking up the user name")
            self._users[node.name] = result.stdout.strip()
        return self.local.format(user=self._users.get(node.name, ""), node=node.name)

    async def folder(self, node: Node) -> str:
        """This deployment's folder on the node's local disk, owned by its user. Jobs create it. Raises SshError, NodeError."""
        return f"{await self.base(node)}/{self.mark}/{node.name}"

    async def run(
        self,
        command: Sequence[str] | str,
        *,
        nodes: Sequence[Node | str] | None = None,
        input: bytes | None = None,  # noqa: A002 - same name as in subprocess
        timeout: float | None = None,  # noqa: ASYNC109 - applies to each node; reported in its CommandResult
        on_line: OnLine | None = None,
        keep: bool = True,
    ) -> dict[str, CommandResult]:
        """Run a command on all nodes in parallel. Failures of nodes do not raise; use `require`.

        stdin is closed unless `input` is given. If `keep` is false, stdout goes only to `on_line` and may have any size. Pass
        secrets in `input`, never in `command`.

        Returns:
            The result of each node by name, in the order of the nodes.
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
                f"{node}: the command timed out after {seconds:g} s and was terminated",
                remedy=f"find out with `deploy ssh {node.name}` why the node is slow; with `deploy run`, increase --timeout",
            )
        except (OSError, asyncssh.Error) as lost:
            error = NodeError(
                f"{node}: the connection was cut ({lost or type(lost).__name__}); the command's outcome is unknown",
                remedy="repeat the command; if you used `deploy run`, first check on the node whether your command ended",
            )
        if code is None and error is None:
            error = NodeError(f"{node}: the connection ended before the command ended", remedy="repeat the command")
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
        """Start a command, write its input and read its output until it ends. Terminate it if this call is left early.

        Returns:
            The return code.

        Raises:
            SshError: the node cannot be reached.
            TimeoutError: the command takes longer than `seconds`.
            OSError, asyncssh.Error: the connection was lost.
        """
        async with self.slot(node):
            process = await self.channel(node, lambda connection: connection.create_process(command, encoding=None))
            try:
                async with asyncio.timeout(seconds):
                    return await running.attend(process, data)
            finally:
                await put_down(process)


def open_fleet(deployment: Deployment, *, config: Sequence[Path] | None = None, connect_timeout: float | None = None) -> Fleet:
    """The fleet of a deployment, with its known_hosts, its folder on the nodes and its mark."""
    return Fleet(
        deployment.nodes,
        known_hosts=deployment.folder.known_hosts,
        local=deployment.data.local,
        mark=deployment.folder.id,
        config=config,
        connect_timeout=connect_timeout or deployment.data.options.connect_timeout,
    )
