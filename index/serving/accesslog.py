"""The access log: one line per response, in the combined format plus the request's Range and the duration in seconds."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import TextIO

from gracefarm.errors import HostError

FLUSH = 0.1
"Maximum seconds a line waits in memory."

_CONTROL = {number: f"\\x{number:02x}" for number in (*range(32), *range(127, 160))}


class AccessLog:
    """Appends to a file or stdout in batches: one write per request would cost more than the request."""

    def __init__(self, target: str | None) -> None:
        self._stream: TextIO | None = None
        if target == "-":
            self._stream = sys.stdout
        elif target is not None:
            try:
                self._stream = open(target, "a", encoding="utf-8")  # noqa: SIM115, PTH123 - lives as long as the server
            except OSError as error:
                raise HostError(
                    f"the access log {target} cannot be written: {error.strerror}",
                    remedy="give a different file with --access-log",
                ) from error
        self.enabled = self._stream is not None
        self._lines: list[str] = []
        self._handle: asyncio.TimerHandle | None = None
        self._second = 0
        self._stamp = ""

    def write(
        self, client: str, method: str, target: str, status: int, size: int, agent: str, span: str, seconds: float
    ) -> None:
        """Log one response."""
        now = int(time.time())
        if now != self._second:
            self._second = now
            self._stamp = time.strftime("%d/%b/%Y:%H:%M:%S +0000", time.gmtime(now))
        agent, span = agent.replace('"', "'"), span.replace('"', "'")
        line = f'{client} - - [{self._stamp}] "{method} {target} HTTP" {status} {size} "{span}" "{agent}" {seconds:.6f}\n'
        if not line[:-1].isprintable():
            line = line[:-1].translate(_CONTROL) + "\n"
        self._lines.append(line)
        if self._handle is None:
            self._handle = asyncio.get_running_loop().call_later(FLUSH, self.flush)

    def flush(self) -> None:
        """Write the waiting lines."""
        self._handle = None
        if self._stream is not None and self._lines:
            lines, self._lines = self._lines, []
            self._stream.write("".join(lines))
            self._stream.flush()

    def close(self) -> None:
        """Write the waiting lines and close the file."""
        self.flush()
        if self._stream is not None and self._stream is not sys.stdout:
            self._stream.close()
