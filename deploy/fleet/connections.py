"""SSH connections to nodes. Only host keys in the deployment's known_hosts are accepted."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self, TypeVar

import asyncssh

from deploy.nodes.config import split_jump
from deploy.nodes.deployment import Node
from gracefarm.errors import GracefarmError, SshError, UsageError

CHANNELS = 8
"Maximum number of concurrent sessions per connection; the default MaxSessions of sshd is 10."
UNANSWERED = 3
"Number of keepalives without an answer, every `connect_timeout` seconds, after which a connection counts as lost."
C = TypeVar("C")


class Connections:
    """SSH connections to nodes and jump hosts, opened on first use, kept open, and reopened when lost."""

    def __init__(self, *, known_hosts: Path, config: Sequence[Path] | None = None, timeout: float = 10.0) -> None:
        self.known_hosts = known_hosts
        self.config = [str(path) for path in config] if config is not None else ()
        "Configuration files of ssh; None: ~/.ssh/config."
        self._timeout = timeout
        self._connections: dict[str, asyncssh.SSHClientConnection] = {}
        self._jumps: dict[str, asyncssh.SSHClientConnection] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._slots: dict[str, asyncio.Semaphore] = {}

    @property
    def patience(self) -> float:
        """Seconds that a node may be unreachable before its job counts as lost."""
        return 30 * self._timeout

    async def connection(self, node: Node) -> asyncssh.SSHClientConnection:
        """The open connection to a node.

        Raises:
            SshError: the node is unreachable, its host key differs, or it refuses our key.
        """
        async with self._locks.setdefault(node.name, asyncio.Lock()):
            connection = self._connections.get(node.name)
            if connection is None or connection.is_closed():
                connection = self._connections[node.name] = await self._open(node)
            return connection

    async def _open(self, node: Node) -> asyncssh.SSHClientConnection:
        if not self.known_hosts.is_file():
            raise SshError(
                f"{node}: the host keys of the nodes are not stored yet",
                remedy="run `deploy init`, which shows the host keys and asks whether to trust them",
            )
        try:
            async with asyncio.timeout(self._timeout):
                tunnel = await self.jump(node.jump, node.key) if node.jump else ()
                options = self.options(node)
                return await asyncssh.connect(options.host, options.port, options=options, tunnel=tunnel)
        except (OSError, asyncssh.Error, ValueError) as error:
            raise explain(node, error) from error

    def options(self, node: Node) -> asyncssh.SSHClientConnectionOptions:
        """Options of the connection: from deploy.toml, else from the configuration of ssh."""
        return asyncssh.SSHClientConnectionOptions(
            host=node.address,
            host_key_alias=node.address,
            known_hosts=str(self.known_hosts),
            config=self.config,
            keepalive_interval=self._timeout,
            keepalive_count_max=UNANSWERED,
            **_access(node.port, node.user, node.key),
        )

    async def jump(self, text: str, key: Path | None) -> asyncssh.SSHClientConnection:
        """The connection to a jump host, shared by all nodes behind it. Its key is pinned here or in ~/.ssh/known_hosts."""
        async with self._locks.setdefault("jump " + text, asyncio.Lock()):
            connection = self._jumps.get(text)
            if connection is not None and not connection.is_closed():
                return connection
            user, host, port = parse_jump(text)
            own = Path.home() / ".ssh" / "known_hosts"
            try:
                connection = self._jumps[text] = await asyncssh.connect(
                    host,
                    known_hosts=[str(path) for path in (self.known_hosts, own) if path.is_file()],
                    config=self.config,
                    keepalive_interval=self._timeout,
                    keepalive_count_max=UNANSWERED,
                    **_access(port, user, key),
                )
            except (OSError, asyncssh.Error, ValueError) as error:
                raise explain(Node(name="jump host", rank=-1, address=host, port=port, key=key), error) from error
            return connection

    async def channel(self, node: Node, opens: Callable[[asyncssh.SSHClientConnection], Awaitable[C]]) -> C:
        """Open a channel. If the connection is dead, reconnect once; this is safe since nothing has run on the channel yet.

        Raises:
            SshError: the node cannot be reached or refuses another session.
        """
        for attempt in (1, 2):
            connection = await self.connection(node)
            try:
                return await opens(connection)
            except (asyncssh.ChannelOpenError, asyncssh.ConnectionLost) as error:
                if attempt == 2 or not connection.is_closed():
                    raise explain(node, error) from error
        raise AssertionError

    def slot(self, node: Node) -> asyncio.Semaphore:
        """Limits the sessions on a node. Hold it during a session."""
        return self._slots.setdefault(node.name, asyncio.Semaphore(CHANNELS))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections; detached jobs continue."""
        for connection in (*self._connections.values(), *self._jumps.values()):
            connection.close()
            with suppress(asyncssh.Error, OSError, TimeoutError):
                async with asyncio.timeout(2):
                    await connection.wait_closed()


def _access(port: int, user: str | None, key: Path | None) -> dict[str, Any]:
    """Options for asyncssh. Values that are not set come from ~/.ssh/config."""
    access: dict[str, Any] = {}
    if port != 22:
        access["port"] = port
    if user:
        access["username"] = user
    if key:
        access["client_keys"] = [str(key)]
    return access


def parse_jump(text: str) -> tuple[str | None, str, int]:
    """User, host and port of [user@]host[:port]. Raises UsageError."""
    try:
        return split_jump(text)
    except ValueError as error:
        raise UsageError(
            str(error), remedy="correct the key jump in deploy.toml, or the option --jump of `deploy init`"
        ) from error


def explain(node: Node, error: BaseException) -> GracefarmError:
    """The error with a remedy for the user."""
    where = f"{node.name} {node.address}:{node.port}"
    if isinstance(error, GracefarmError):
        return error
    if isinstance(error, asyncssh.HostKeyNotVerifiable):
        return SshError(
            f"{where}: the host key differs from the pinned key: {error.reason}",
            remedy="compare the fingerprint with the one on the node's console; if the node was reinstalled, run `deploy "
            "init --repin`",
        )
    if isinstance(error, asyncssh.PermissionDenied):
        return SshError(
            f"{where} refuses the key: {error.reason}",
            remedy="set user and key in [nodes] of deploy.toml, or load the key with `ssh-add KEY`",
        )
    if isinstance(error, (asyncssh.KeyImportError, asyncssh.KeyEncryptionError)):
        key = node.key or f"{where}: a key in the configuration of ssh"
        return SshError(
            f"{key}: {error}",
            remedy="use a private key in OpenSSH's format; if it has a passphrase, load it with `ssh-add` and remove"
            " `key` from [nodes] in deploy.toml",
        )
    if isinstance(error, asyncssh.ConfigParseError):
        return SshError(
            f"the configuration of ssh cannot be read: {error}",
            remedy="fix this line of ~/.ssh/config, then check the file with `ssh -G HOST`",
        )
    if isinstance(error, FileNotFoundError):
        return SshError(
            f"{where}: no such file: {error.filename}", remedy="set key in [nodes] of deploy.toml to the path of a private key"
        )
    text = (
        "no answer"
        if isinstance(error, TimeoutError)
        else str(getattr(error, "strerror", None) or error or type(error).__name__)
    )
    return SshError(
        f"{where} cannot be reached: {text}",
        remedy="check that the node is running, that its address is correct, and that the port of sshd is open",
    )
