"""One command while it runs on a node: its streams, its environment, its end."""

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
"Bytes of output that are kept of one command."
OnLine = Callable[[Node, str, str], None]
"Node, `stdout` or `stderr`, one line without its end."


def command_line(command: Sequence[str] | str) -> str:
    """A list is quoted, a string is the node's shell's own."""
    return command if isinstance(command, str) else shlex.join(command)


def env_block(env: Mapping[str, str]) -> bytes:
    """Variables as jobs.sh reads them from stdin, so that no argument list shows them. Raises UsageError."""
    for name, value in env.items():
        if "\n" in value or not name.isidentifier():
            raise UsageError(
                f"{name}: no environment variable that can be sent", remedy="one line, a name of letters and digits"
            )
    return "".join(f"{name}={value}\n" for name, value in env.items()).encode() + b".\n"


@dataclass
class LineSplitter:
    """Bytes as they come to whole lines, counted so that a cut can be mended."""

    on_line: Callable[[str], None]
    size: int = 0
    rest: bytes = b""

    def feed(self, block: bytes) -> None:
        """Hand on the lines that are whole now."""
        self.size += len(block)
        *lines, self.rest = (self.rest + block).split(b"\n")
        for line in lines:
            self.on_line(line.decode(errors="replace"))

    def end(self) -> None:
        """Hand on what has no end of line."""
        if self.rest:
            self.on_line(self.rest.decode(errors="replace"))
            self.rest = b""


@dataclass
class RunningCommand:
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
                raise NodeError(f"{self.node}: more than {LIMIT >> 20} MiB of {name}", remedy="write it to a file there")
        lines.end()


async def _feed(process: asyncssh.SSHClientProcess[bytes], data: bytes) -> None:
    with suppress(BrokenPipeError, ConnectionError, asyncssh.Error):
        for at in range(0, len(data), 1 << 16):
            process.stdin.write(data[at : at + (1 << 16)])
            await process.stdin.drain()
        process.stdin.write_eof()


async def put_down(process: asyncssh.SSHClientProcess[bytes]) -> None:
    """A command that we leave is told to end: closing the channel alone would let it run on."""
    if process.exit_status is None and process.exit_signal is None:
        with suppress(OSError, asyncssh.Error):
            process.terminate()
    process.close()


def _signal_number(name: str) -> int:
    return int(getattr(signal, "SIG" + name, 0))
