"""A command that runs on a node: its streams, its environment, how it ends."""

from __future__ import annotations

import asyncio
import shlex
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import asyncssh

from deploy.nodes.deployment import Node
from gracefarm.errors import NodeError, UsageError

LIMIT = 64 << 20
"Maximum number of bytes of output of one command."
OnLine = Callable[[Node, str, str], None]
"Called with the node, `stdout` or `stderr`, and one line without its line break."


def command_line(command: Sequence[str] | str) -> str:
    """The command for the node's shell. The words of a list are quoted; a string is used as it is."""
    return command if isinstance(command, str) else shlex.join(command)


def env_block(env: Mapping[str, str]) -> bytes:
    """Variables in the format that jobs.sh reads from stdin, so that they do not appear in arguments. Raises UsageError."""
    for name, value in env.items():
        if "\n" in value or not name.isidentifier():
            raise UsageError(
                f"the environment variable {name} cannot be sent to the nodes",
                remedy="give the variable a value without line breaks, and a name of letters, digits and _",
            )
    return "".join(f"{name}={value}\n" for name, value in env.items()).encode() + b".\n"


@dataclass
class LineSplitter:
    """Splits blocks of bytes into lines. `size` counts the bytes, so that reading can continue after a lost connection."""

    on_line: Callable[[str], None]
    size: int = 0
    rest: bytes = b""

    def feed(self, block: bytes) -> None:
        """Add a block and pass on all complete lines."""
        self.size += len(block)
        *lines, self.rest = (self.rest + block).split(b"\n")
        for line in lines:
            self.on_line(line.decode(errors="replace"))

    def end(self) -> None:
        """Pass on the last line, which has no line break."""
        if self.rest:
            self.on_line(self.rest.decode(errors="replace"))
            self.rest = b""


@dataclass
class RunningCommand:
    """The output of a command while it runs."""

    node: Node
    on_line: OnLine | None
    on_bytes: Callable[[bytes], None] | None = None
    keep: bool = True
    "Keep stdout even if `on_line` receives its lines."
    out: bytearray = field(default_factory=bytearray)
    err: bytearray = field(default_factory=bytearray)

    async def attend(self, process: asyncssh.SSHClientProcess[bytes], data: bytes) -> int | None:
        """Write stdin and read both streams until they end. Return the return code."""
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
        lines = LineSplitter(lambda line: self.on_line(self.node, name, line) if self.on_line else None)
        while block := await stream.read(1 << 16):
            if self.on_bytes and name == "stdout":
                self.on_bytes(block)
                continue
            if self.on_line:
                lines.feed(block)
            if self.keep or not self.on_line or name == "stderr":
                kept += block
            if max(len(kept), len(lines.rest)) > LIMIT:
                raise NodeError(
                    f"{self.node}: {name} of the command is larger than {LIMIT >> 20} MiB",
                    remedy="redirect this output to a file on the node",
                )
        lines.end()


async def _feed(process: asyncssh.SSHClientProcess[bytes], data: bytes) -> None:
    with suppress(BrokenPipeError, ConnectionError, asyncssh.Error):
        for at in range(0, len(data), 1 << 16):
            process.stdin.write(data[at : at + (1 << 16)])
            await process.stdin.drain()
        process.stdin.write_eof()


async def put_down(process: asyncssh.SSHClientProcess[bytes]) -> None:
    """Terminate the command if it still runs. It would continue if only the channel was closed."""
    if process.exit_status is None and process.exit_signal is None:
        with suppress(OSError, asyncssh.Error):
            process.terminate()
    process.close()


def _signal_number(name: str) -> int:
    return int(getattr(signal, "SIG" + name, 0))
