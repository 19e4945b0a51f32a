"""Run a command on the machine itself, with its files and devices, our environment and, if possible, without network.

For `--toolchain host`. The supervisor, the meter and the recorder of network attempts are those of the sandbox. Unlike in the
sandbox, the command can access other files and processes.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from builder.box.supervisor import OPTIONS

LAUNCHER = Path(__file__).parent.parent / "data" / "host" / "launcher.py"


@dataclass(frozen=True, kw_only=True)
class HostPlace:
    """The environment of the command on the machine."""

    environment: Mapping[str, str]
    "Complete: nothing is inherited."
    workdir: str
    memory: int
    "Maximum bytes of memory of the whole process tree."
    network: bool = False
    "Share the machine's network; else the command has only `lo`."

    hears_every_name = False
    "A resolver of the machine may use a server on loopback, which the recorder does not see."

    @property
    def hostname(self) -> str:
        """The machine's host name. A query for it is not a network attempt."""
        return socket.gethostname()

    @property
    def reads(self) -> tuple[Path, ...]:
        """None: the machine's own tools."""
        return ()

    def command(self, argv: Sequence[str], *, terminal: bool = False) -> list[str]:
        """The complete command line; the supervisor replaces OPTIONS with its descriptors."""
        spec = {"environment": dict(self.environment), "workdir": self.workdir, "network": self.network}
        return [sys.executable, "-I", "-S", str(LAUNCHER), OPTIONS, json.dumps(spec), "--", *argv]


def uncut() -> str | None:
    """Why this machine cannot disable the network for a command, from a real attempt; None if it can."""
    place = HostPlace(environment={"PATH": "/usr/bin:/bin"}, workdir="/", memory=0)
    line = place.command(["true"])
    at = line.index(OPTIONS)
    # The status is discarded, and a closed gate lets the command start.
    line[at : at + 1] = ["--json-status-fd", "1", "--block-fd", "0"]
    tried = subprocess.run(line, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    return None if tried.returncode == 0 else tried.stderr.strip().removeprefix("launcher: ") or "it ended without a message"
