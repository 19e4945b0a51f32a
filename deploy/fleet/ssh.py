"""All nodes at once over SSH: commands, files, detached jobs, tunnels; host keys from the deployment's known_hosts alone."""

from __future__ import annotations

import asyncio
import os
import secrets
import shlex
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

import asyncssh

from deploy.nodes.config import split_jump
from deploy.nodes.deployment import Deployment, Node
from gracefarm.errors import GracefarmError, NodeError, SshError, UsageError
from gracefarm.files import atomic_write
from gracefarm.process import last_line

LOCAL = "/tmp/gracefarm-{user}"  # noqa: S108 - jobs.sh refuses it when somebody else owns it
CHANNELS = 8
"Sessions on one connection at a time; sshd's MaxSessions is 10."
UNANSWERED = 3
"Questions without an answer, `connect_timeout` apart, until a connection counts as lost."
ALGORITHMS = ("ssh-ed25519", "ecdsa-sha2-nistp256", "rsa-sha2-512")
"Kinds of host keys that are pinned, best first."
LIMIT = 64 << 20
"Bytes of output that are kept of one command."
C = TypeVar("C")
OnLine = Callable[[Node, str, str], None]
"Node, `stdout` or `stderr`, one line without its end."


@dataclass(frozen=True, kw_only=True)
class CommandResult:
    """What became of a command on one node."""

    node: Node
    returncode: int | None
    "128 + N after signal N, as a shell says; None: unknown, see `error`."
    raw: bytes = b""
    "stdout as it came."
    stderr: str = ""
    error: GracefarmError | None = None
    "Why there is no return code: not reached, cut, timed out."
    seconds: float = 0.0

    @property
    def stdout(self) -> str:
        """stdout as text."""
        return self.raw.decode(errors="replace")

    @property
    def ok(self) -> bool:
        """Ended with 0."""
        return self.returncode == 0


JobState = Literal["absent", "running", "exited", "stopped", "lost"]


@dataclass(frozen=True, kw_only=True)
class JobStatus:
    """A detached job, as looked at on its node. `lost`: killed, or the node started again."""

    state: JobState
    pid: int | None = None
    returncode: int | None = None
    size: int = 0
    "Bytes of its log."


def require(results: Mapping[str, CommandResult], what: str) -> None:
    """Nothing, when all ended with 0.

    Raises:
        GracefarmError: the first node's, which names how many others failed too.
    """
    bad = [one for one in results.values() if not one.ok]
    if not bad:
        return
    first = bad[0]
    more = f" (and on {len(bad) - 1} more: {', '.join(one.node.name for one in bad[1:])})" if len(bad) > 1 else ""
    if first.error:
        raise type(first.error)(f"{what}: {first.error.cause}{more}", remedy=first.error.remedy)
    reason = last_line(first.stderr.strip() or first.stdout, "")
    raise NodeError(
        f"{what}: {first.node} ended with {first.returncode}{': ' + reason if reason else ''}{more}",
        remedy=f"look there: `deploy ssh {first.node.name}`",
    )


def command_line(command: Sequence[str] | str) -> str:
    """A list is quoted, a string is the node's shell's own."""
    return command if isinstance(command, str) else shlex.join(command)


@cache
def _jobs_script() -> str:
    return (resources.files("deploy") / "data" / "jobs.sh").read_text()


def _with_env(command: str, env: Mapping[str, str]) -> tuple[str, bytes]:
    """The environment goes in on stdin, so that no argument list shows it."""
    script = 'while IFS= read -r line && [ "$line" != . ]; do export "$line"; done; exec sh -c "$1"'
    return shlex.join(["sh", "-c", script, "sh", command]), _env_block(env)


def _env_block(env: Mapping[str, str]) -> bytes:
    for name, value in env.items():
        if "\n" in value or not name.isidentifier():
            raise UsageError(
                f"{name}: no environment variable that can be sent", remedy="one line, a name of letters and digits"
            )
    return "".join(f"{name}={value}\n" for name, value in env.items()).encode() + b".\n"


class Fleet:
    """Connections to nodes, made when first needed, kept, and made again after a cut. Use it by `fleet()`."""

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
        self.nodes = tuple(nodes)
        self.known_hosts = known_hosts
        self.local = local
        self.mark = mark
        self._config = [str(one) for one in config] if config is not None else ()
        self._timeout = connect_timeout
        self._connections: dict[str, asyncssh.SSHClientConnection] = {}
        self._jumps: dict[str, asyncssh.SSHClientConnection] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._slots: dict[str, asyncio.Semaphore] = {}
        self._users: dict[str, str] = {}

    @property
    def patience(self) -> float:
        """Seconds for which a node may be out of reach until what it does for us counts as lost."""
        return 30 * self._timeout

    # connections

    async def connect(self, nodes: Sequence[Node | str] | None = None) -> dict[str, GracefarmError | None]:
        """Connect to nodes at once; for each None, or why not."""

        async def one(node: Node) -> GracefarmError | None:
            try:
                await self.connection(node)
            except GracefarmError as error:
                return error
            return None

        chosen = self.pick(nodes)
        return dict(zip([each.name for each in chosen], await asyncio.gather(*map(one, chosen)), strict=True))

    async def connection(self, node: Node) -> asyncssh.SSHClientConnection:
        """The open connection to a node. Raises SshError: unreachable, another host key, refused key."""
        async with self._locks.setdefault(node.name, asyncio.Lock()):
            kept = self._connections.get(node.name)
            if kept is not None and not kept.is_closed():
                return kept
            made = self._connections[node.name] = await self._open(node)
            return made

    async def _open(self, node: Node) -> asyncssh.SSHClientConnection:
        if not self.known_hosts.is_file():
            raise SshError(f"{node}: no host keys are pinned yet", remedy="`deploy init` shows them and pins what you accept")
        try:
            async with asyncio.timeout(self._timeout):
                tunnel = await self.jump(node.jump, node.key) if node.jump else ()
                options = self._options(node)
                return await asyncssh.connect(options.host, options.port, options=options, tunnel=tunnel)
        except (OSError, asyncssh.Error, ValueError) as error:
            raise explain(node, error) from error

    def _options(self, node: Node) -> asyncssh.SSHClientConnectionOptions:
        return asyncssh.SSHClientConnectionOptions(
            host=node.address,
            host_key_alias=node.address,
            known_hosts=str(self.known_hosts),
            config=self._config,
            keepalive_interval=self._timeout,
            keepalive_count_max=UNANSWERED,
            **_access(node.port, node.user, node.key),
        )

    async def jump(self, text: str, key: Path | None) -> asyncssh.SSHClientConnection:
        """The connection to a jump host, one for all behind it; its key is pinned here or in ~/.ssh/known_hosts."""
        async with self._locks.setdefault("jump " + text, asyncio.Lock()):
            kept = self._jumps.get(text)
            if kept is not None and not kept.is_closed():
                return kept
            user, host, port = parse_jump(text)
            own = Path.home() / ".ssh" / "known_hosts"
            try:
                self._jumps[text] = made = await asyncssh.connect(
                    host,
                    known_hosts=[str(one) for one in (self.known_hosts, own) if one.is_file()],
                    config=self._config,
                    keepalive_interval=self._timeout,
                    keepalive_count_max=UNANSWERED,
                    **_access(port, user, key),
                )
            except (OSError, asyncssh.Error, ValueError) as error:
                raise explain(Node(name="jump host", rank=-1, address=host, port=port, key=key), error) from error
            return made

    async def close(self) -> None:
        """Close what is open; detached jobs go on."""
        for one in (*self._connections.values(), *self._jumps.values()):
            one.close()
            with suppress(asyncssh.Error, OSError, TimeoutError):
                async with asyncio.timeout(2):
                    await one.wait_closed()

    def pick(self, nodes: Sequence[Node | str] | None) -> tuple[Node, ...]:
        """Nodes by name or themselves; None: all."""
        if nodes is None:
            return self.nodes
        names = {one.name: one for one in self.nodes}
        return tuple(names[one] if isinstance(one, str) else one for one in nodes)

    # commands

    async def run(
        self,
        command: Sequence[str] | str,
        *,
        nodes: Sequence[Node | str] | None = None,
        input: bytes | None = None,  # noqa: A002 - subprocess's word
        timeout: float | None = None,  # noqa: ASYNC109 - a time for each node, told in its Result
        env: Mapping[str, str] | None = None,
        on_line: OnLine | None = None,
        keep: bool = True,
    ) -> dict[str, CommandResult]:
        """A command on all nodes at once: node name to Result, in the nodes' order. Never raises for a node; `require` does.

        stdin is closed unless there is `input`. `keep` false: `on_line` alone has stdout, however much it is. Secrets go in
        `input` or `env` (which travels on stdin), never in `command`.
        """
        chosen = self.pick(nodes)
        text = command_line(command)
        data = input or b""
        if env:
            text, block = _with_env(text, env)
            data = block + data
        results = await asyncio.gather(*(self._run(one, text, data, timeout, on_line, keep) for one in chosen))
        return {one.node.name: one for one in results}

    async def _run(
        self, node: Node, command: str, data: bytes, seconds: float | None, on_line: OnLine | None, keep: bool
    ) -> CommandResult:
        begin = time.monotonic()
        running = _Running(node, on_line, keep=keep)
        error: GracefarmError | None = None
        code: int | None = None
        try:
            async with self._slots.setdefault(node.name, asyncio.Semaphore(CHANNELS)):
                process = await self._process(node, command)
                try:
                    async with asyncio.timeout(seconds):
                        code = await running.attend(process, data)
                finally:
                    await _put_down(process)
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

    async def _process(self, node: Node, command: str) -> asyncssh.SSHClientProcess[bytes]:
        """Start it. Raises SshError: not reached, or no further session is allowed there."""
        return await self._channel(node, lambda connection: connection.create_process(command, encoding=None))

    async def _channel(self, node: Node, opens: Callable[[asyncssh.SSHClientConnection], Awaitable[C]]) -> C:
        """A channel. A connection that had died unnoticed is made again once: nothing has run over this one yet."""
        for attempt in (1, 2):
            connection = await self.connection(node)
            try:
                return await opens(connection)
            except (asyncssh.ChannelOpenError, asyncssh.ConnectionLost) as error:
                if attempt == 2 or not connection.is_closed():
                    raise explain(node, error) from error
        raise AssertionError

    # files

    async def put(
        self, content: bytes | Path, remote: str, *, nodes: Sequence[Node | str] | None = None, mode: int = 0o600
    ) -> dict[str, CommandResult]:
        """Place a file on all nodes at once, whole or not at all; its folder is made (0700)."""
        data = await asyncio.to_thread(content.read_bytes) if isinstance(content, Path) else content
        place = PurePosixPath(remote)
        partial = str(place.with_name(f".{place.name}.{secrets.token_hex(6)}.part"))

        async def one(_node: Node, sftp: asyncssh.SFTPClient) -> None:
            await sftp.makedirs(str(place.parent), asyncssh.SFTPAttrs(permissions=0o700), exist_ok=True)
            try:
                async with sftp.open(partial, "xb", asyncssh.SFTPAttrs(permissions=mode)) as stream:
                    await stream.write(data)
                await sftp.chmod(partial, mode)
                await sftp.posix_rename(partial, remote)
            except BaseException:
                with suppress(asyncssh.Error, OSError):
                    await sftp.remove(partial)
                raise

        return await self._sftp(nodes, f"placing {remote}", one)

    async def get(self, remote: str, folder: Path, *, nodes: Sequence[Node | str] | None = None) -> dict[str, CommandResult]:
        """Fetch a file of all nodes into `folder`/NODE/, whole or not at all."""

        async def one(node: Node, sftp: asyncssh.SFTPClient) -> None:
            async with sftp.open(remote, "rb") as stream:
                data = await stream.read()
            await asyncio.to_thread(atomic_write, folder / node.name / PurePosixPath(remote).name, data)

        return await self._sftp(nodes, f"fetching {remote}", one)

    async def _sftp(
        self,
        nodes: Sequence[Node | str] | None,
        what: str,
        work: Callable[[Node, asyncssh.SFTPClient], Awaitable[None]],
    ) -> dict[str, CommandResult]:
        async def one(node: Node) -> CommandResult:
            begin = time.monotonic()
            problem: GracefarmError | None = None
            try:
                async with (
                    self._slots.setdefault(node.name, asyncio.Semaphore(CHANNELS)),
                    await self._channel(node, lambda connection: connection.start_sftp_client()) as sftp,
                ):
                    await work(node, sftp)
            except GracefarmError as error:
                problem = error
            except (OSError, asyncssh.Error) as error:
                problem = NodeError(f"{node}: {what}: {error}", remedy=f"look there: `deploy ssh {node.name}`")
            return CommandResult(node=node, returncode=None if problem else 0, error=problem, seconds=time.monotonic() - begin)

        return {done.node.name: done for done in await asyncio.gather(*map(one, self.pick(nodes)))}

    # detached jobs

    async def folder(self, node: Node) -> str:
        """This deployment's folder on the node's own disk, owned by its user; jobs make it. Raises SshError, NodeError."""
        return f"{await self._base(node)}/{self.mark}/{node.name}"

    async def _base(self, node: Node) -> str:
        if "{user}" in self.local and node.name not in self._users:
            done = (await self.run(["id", "-un"], nodes=[node], timeout=30))[node.name]
            require({node.name: done}, "asking for the user")
            self._users[node.name] = done.stdout.strip()
        return self.local.format(user=self._users.get(node.name, ""), node=node.name)

    async def _job(
        self, verb: str, node: Node, name: str, *more: str, on_line: OnLine | None = None, data: bytes = b""
    ) -> CommandResult:
        folder = f"{await self.folder(node)}/jobs/{name}"
        arguments = [verb, folder, f"{self.mark}/{node.name}/{name}", *more]
        command = ["sh", "-c", _jobs_script(), "gracefarm-jobs", *arguments]
        return (await self.run(command, nodes=[node], input=data, on_line=on_line))[node.name]

    async def start_job(
        self,
        node: Node,
        name: str,
        command: Sequence[str] | str,
        env: Mapping[str, str] | None = None,
        input: bytes | None = None,  # noqa: A002
    ) -> bool:
        """Start a command that outlives the connection; False: a job of this name runs already, and was left alone.

        It gets a session of its own, its output goes to a log in the node's folder, `env` and `input` by stdin.
        Raises:
            NodeError, SshError: it could not be started.
        """
        data = _env_block(env or {}) + (input or b"")
        done = await self._job("start", node, name, command_line(command), await self._base(node), data=data)
        require({node.name: done}, f"starting {name}")
        return done.stdout.startswith("started")

    async def job_status(self, node: Node, name: str) -> JobStatus:
        """Look at a job. Raises NodeError, SshError."""
        done = await self._job("status", node, name)
        require({node.name: done}, f"looking at {name}")
        words = done.stdout.split()
        state: Any = words[0]
        number = int(words[1]) if words[1] != "-" else None
        return JobStatus(
            state=state,
            pid=number if state == "running" else None,
            returncode=number if state == "exited" else None,
            size=int(words[2]),
        )

    async def follow_job(
        self, node: Node, name: str, on_line: Callable[[str], None], *, offset: int = 0, patience: float = 300.0
    ) -> JobStatus:
        """Hand on each line of its log, from byte `offset`, until it ends; goes on after a cut without loss or repetition.

        Raises:
            SshError, NodeError: the node could not be reached for `patience` seconds.
        """
        since = time.monotonic()
        log = _Log(on_line)
        while True:
            before = log.size
            try:
                done = await self._follow(node, name, offset, log)
                if done.ok:
                    status = await self.job_status(node, name)
                    if status.state != "running":
                        log.end()
                        return status
                problem: GracefarmError | None = done.error
                if problem is None and not done.ok:
                    problem = NodeError(
                        f"{node}: the log of {name} cannot be read: {done.stderr.strip() or done.returncode}",
                        remedy=f"look there: `deploy ssh {node.name}`",
                    )
            except GracefarmError as error:
                problem = error
            if log.size > before or problem is None:
                since = time.monotonic()
            if problem and time.monotonic() - since > patience:
                raise problem
            await asyncio.sleep(0.5)

    async def _follow(self, node: Node, name: str, offset: int, log: _Log) -> CommandResult:
        folder = f"{await self.folder(node)}/jobs/{name}"
        arguments = ["follow", folder, f"{self.mark}/{node.name}/{name}", str(offset + log.size)]
        command = shlex.join(["sh", "-c", _jobs_script(), "gracefarm-jobs", *arguments])
        running = _Running(node, None, log.feed)
        code: int | None = None
        error: GracefarmError | None = None
        try:
            async with self._slots.setdefault(node.name, asyncio.Semaphore(CHANNELS)):
                process = await self._process(node, command)
                try:
                    code = await running.attend(process, b"")
                finally:
                    await _put_down(process)
        except (OSError, asyncssh.Error) as lost:
            error = explain(node, lost)
        if code is None and error is None:
            error = SshError(f"{node}: the connection was cut", remedy="the job goes on; repeat the command")
        return CommandResult(node=node, returncode=code, stderr=running.err.decode(errors="replace"), error=error)

    async def stop_job(self, node: Node, name: str, *, grace: float = 10.0) -> None:
        """TERM to every process of the job, KILL after `grace` seconds, and a look that none is left; absent is fine.

        Raises:
            NodeError: processes are left (another user's); SshError: not reached.
        """
        done = await self._job("stop", node, name, str(int(grace)))
        if done.returncode == 1 and done.stdout.strip():
            raise NodeError(
                f"{node}: processes of {name} cannot be ended: {done.stdout.strip()}", remedy="end them as their owner"
            )
        require({node.name: done}, f"stopping {name}")

    # tunnels

    @asynccontextmanager
    async def forward_local(self, node: Node, local_port: int, remote_host: str, remote_port: int) -> AsyncIterator[int]:
        """A port on 127.0.0.1 here that leads to one there; 0 takes a free one. Yields it. Connects again after a cut.

        Raises:
            SshError: the port is taken here, or the node cannot be entered.
        """
        await self.connection(node)
        tasks: set[asyncio.Task[None]] = set()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task
            tasks.add(task)
            try:
                far_reader, far_writer = await self._channel(
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


@dataclass
class _Log:
    """Bytes as they come to whole lines, counted so that a cut can be mended."""

    on_line: Callable[[str], None]
    size: int = 0
    rest: bytes = b""

    def feed(self, block: bytes) -> None:
        self.size += len(block)
        *lines, self.rest = (self.rest + block).split(b"\n")
        for line in lines:
            self.on_line(line.decode(errors="replace"))

    def end(self) -> None:
        if self.rest:
            self.on_line(self.rest.decode(errors="replace"))
            self.rest = b""


@dataclass
class _Running:
    """The output of one command while it runs."""

    node: Node
    on_line: OnLine | None
    on_bytes: Callable[[bytes], None] | None = None
    keep: bool = True
    "stdout too, where `on_line` has had its lines."
    out: bytearray = field(default_factory=bytearray)
    err: bytearray = field(default_factory=bytearray)

    async def attend(self, process: asyncssh.SSHClientProcess[bytes], data: bytes) -> int | None:
        """Feed stdin, read both streams to their ends; the return code."""
        await asyncio.gather(
            _feed(process, data),
            self._read(process.stdout, "stdout", self.out),
            self._read(process.stderr, "stderr", self.err),
        )
        await process.wait_closed()
        if process.exit_signal:
            return 128 + _signal_number(process.exit_signal[0])
        return process.exit_status

    async def _read(self, stream: asyncssh.SSHReader[bytes], name: str, kept: bytearray) -> None:
        lines = _Log(lambda line: self.on_line(self.node, name, line) if self.on_line else None)
        while block := await stream.read(1 << 16):
            if self.on_bytes and name == "stdout":
                self.on_bytes(block)
                continue
            if self.on_line:
                lines.feed(block)
            if self.keep or not self.on_line or name == "stderr":
                kept += block
            if max(len(kept), len(lines.rest)) > LIMIT:
                raise NodeError(f"{self.node}: more than {LIMIT >> 20} MiB of {name}", remedy="write it to a file there")
        lines.end()


async def _feed(process: asyncssh.SSHClientProcess[bytes], data: bytes) -> None:
    with suppress(BrokenPipeError, ConnectionError, asyncssh.Error):
        for at in range(0, len(data), 1 << 16):
            process.stdin.write(data[at : at + (1 << 16)])
            await process.stdin.drain()
        process.stdin.write_eof()


async def _put_down(process: asyncssh.SSHClientProcess[bytes]) -> None:
    """A command that we leave is told to end: closing the channel alone would let it run on."""
    if process.exit_status is None and process.exit_signal is None:
        with suppress(OSError, asyncssh.Error):
            process.terminate()
    process.close()


async def _pump(source: Any, target: Any) -> None:
    try:
        while block := await source.read(1 << 16):
            target.write(block)
            await target.drain()
    finally:
        with suppress(OSError, asyncssh.Error):
            target.write_eof()


def _signal_number(name: str) -> int:
    import signal

    return int(getattr(signal, "SIG" + name, 0))


def _access(port: int, user: str | None, key: Path | None) -> dict[str, Any]:
    """What is not said is left to ~/.ssh/config."""
    access: dict[str, Any] = {}
    if port != 22:
        access["port"] = port
    if user:
        access["username"] = user
    if key:
        access["client_keys"] = [str(key)]
    return access


def parse_jump(text: str) -> tuple[str | None, str, int]:
    """[user@]host[:port]. Raises UsageError."""
    try:
        return split_jump(text)
    except ValueError as error:
        raise UsageError(str(error), remedy="jump = in deploy.toml, or --jump") from error


def explain(node: Node, error: BaseException) -> GracefarmError:
    """What a person can do about it."""
    where = f"{node.name} {node.address}:{node.port}"
    if isinstance(error, GracefarmError):
        return error
    if isinstance(error, asyncssh.HostKeyNotVerifiable):
        return SshError(
            f"{where} does not show the pinned host key: {error.reason}",
            remedy="compare the fingerprint on the node's own console; a node that was made anew: `deploy init --repin`",
        )
    if isinstance(error, asyncssh.PermissionDenied):
        return SshError(
            f"{where} refuses the key: {error.reason}",
            remedy="set user and key in deploy.toml ([nodes]), or load the key: ssh-add",
        )
    if isinstance(error, (asyncssh.KeyImportError, asyncssh.KeyEncryptionError)):
        key = node.key or f"{where}: a key that ssh's configuration names"
        return SshError(f"{key}: {error}", remedy="a private key in OpenSSH's format; with a passphrase: ssh-add")
    if isinstance(error, asyncssh.ConfigParseError):
        return SshError(
            f"the configuration of ssh cannot be read: {error}", remedy="mend that line: `ssh -G HOST` reads it too"
        )
    if isinstance(error, FileNotFoundError):
        return SshError(f"{where}: no such file: {error.filename}", remedy="set key in deploy.toml")
    text = (
        "no answer"
        if isinstance(error, TimeoutError)
        else str(getattr(error, "strerror", None) or error or type(error).__name__)
    )
    return SshError(f"{where} cannot be reached: {text}", remedy="is it up, is the address right, is port 22 open?")


@asynccontextmanager
async def fleet(
    source: Deployment | Sequence[Node],
    *,
    known_hosts: Path | None = None,
    local: str | None = None,
    mark: str | None = None,
    config: Sequence[Path] | None = None,
    connect_timeout: float | None = None,
) -> AsyncIterator[Fleet]:
    """Nodes to work with; closed at the end, and detached jobs go on.

    A Deployment brings its known_hosts, its folder on the nodes and its mark. Connections are made when first needed.
    """
    if isinstance(source, Deployment):
        made = Fleet(
            source.nodes,
            known_hosts=known_hosts or source.folder.known_hosts,
            local=local or source.data.local,
            mark=mark or source.folder.id,
            config=config,
            connect_timeout=connect_timeout or source.data.options.connect_timeout,
        )
    else:
        if known_hosts is None:
            raise UsageError("known_hosts must be given with bare nodes")
        made = Fleet(
            source,
            known_hosts=known_hosts,
            local=local or LOCAL,
            mark=mark or "adhoc",
            config=config,
            connect_timeout=connect_timeout or 10.0,
        )
    async with AsyncExitStack() as stack:
        stack.push_async_callback(made.close)
        yield made


# host keys


async def scan(fleet_: Fleet, node: Node) -> list[tuple[str, asyncssh.SSHKey]]:
    """The host key that a node shows, and its jump host's, by their names in known_hosts. Shown to a person, not trusted.

    Raises:
        SshError: not reached.
    """
    found = []
    try:
        async with asyncio.timeout(30):
            tunnel: Any = ()
            if node.jump:
                _user, host, port = parse_jump(node.jump)
                tunnel = await fleet_.jump(node.jump, node.key)
                key = tunnel.get_server_host_key()
                if key:
                    found.append((entry_name(host, port), key))
            options = fleet_._options(node)
            tunnel = tunnel or options.tunnel or ()  # ProxyJump of ~/.ssh/config stands under the name, not the address
            key = await asyncssh.get_server_host_key(
                options.host,
                options.port,
                tunnel=tunnel,
                config=fleet_._config,
                server_host_key_algs=list(ALGORITHMS),
            )
    except (OSError, asyncssh.Error, ValueError) as error:  # ValueError: a key or a configuration that cannot be read
        raise explain(node, error) from error
    if key is None:
        raise SshError(f"{node} shows no host key", remedy="is that an SSH server?")
    return [*found, (entry_name(node.address, options.port), key)]


def entry_name(address: str, port: int) -> str:
    """As known_hosts writes it."""
    return address if port == 22 else f"[{address}]:{port}"


def pinned(known_hosts: Path) -> dict[str, str]:
    """Name to `type base64` of a known_hosts file that we wrote; hashed names are not among them."""
    if not known_hosts.is_file():
        return {}
    entries: dict[str, str] = {}
    for line in known_hosts.read_text().splitlines():
        words = line.split()
        if len(words) >= 3 and not line.startswith(("#", "@", "|")):
            entries.update((name, f"{words[1]} {words[2]}") for name in words[0].split(","))
    return entries


def pin(known_hosts: Path, keys: Iterable[tuple[str, asyncssh.SSHKey]]) -> None:
    """Write keys into known_hosts (0600), replacing what stood there under the same names."""
    entries = pinned(known_hosts)
    for name, key in keys:
        entries[name] = " ".join(key.export_public_key().decode().split()[:2])
    atomic_write(known_hosts, "".join(f"{name} {key}\n" for name, key in entries.items()))
    os.chmod(known_hosts, 0o600)  # noqa: PTH101


def matches(known_hosts: Path, name: str, key: asyncssh.SSHKey) -> bool:
    """The file (hashed names too) holds this very key for this name."""
    host, _, port = name.removeprefix("[").partition("]:")
    trusted = asyncssh.read_known_hosts(str(known_hosts)).match(host, "", int(port) if port else None)[0]
    return any(one.public_data == key.public_data for one in trusted)
