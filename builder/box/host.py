"""A command on the machine itself: its own files and devices, an environment of ours, and no network where that can be cut.

For `--toolchain host`. The supervisor, the meter and the recorder of network attempts are those of the sandbox;
what a sandbox shuts out beside the network (other files, other processes) is open here.
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
    """What the command sees beside the machine."""

    environment: Mapping[str, str]
    "Complete: nothing is inherited."
    workdir: str
    memory: int
    "Bytes that the whole tree of processes may use."
    network: bool = False
    "Leave it the machine's network; else it has `lo` alone."

    hears_every_name = False
    "A resolver of the machine may ask a server on loopback, which the recorder does not hear."

    @property
    def hostname(self) -> str:
        """The name that is this machine's own, and no attempt to reach another."""
        return socket.gethostname()

    def command(self, argv: Sequence[str], *, terminal: bool = False) -> list[str]:
        """The complete command line; the supervisor puts its descriptors where OPTIONS stands."""
        spec = {"environment": dict(self.environment), "workdir": self.workdir, "network": self.network}
        return [sys.executable, "-I", "-S", str(LAUNCHER), OPTIONS, json.dumps(spec), "--", *argv]


def uncut() -> str | None:
    """Why the network cannot be cut off on this machine, tried for real; None when it can."""
    place = HostPlace(environment={"PATH": "/usr/bin:/bin"}, workdir="/", memory=0)
    line = place.command(["true"])
    at = line.index(OPTIONS)
    # Status to nowhere, and a gate that has ended already lets the command start.
    line[at : at + 1] = ["--json-status-fd", "1", "--block-fd", "0"]
    tried = subprocess.run(line, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    return None if tried.returncode == 0 else tried.stderr.strip().removeprefix("launcher: ") or "it ended without a word"
