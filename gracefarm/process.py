"""Run other programs so that they end with this process, and extract their messages.

The module also runs on nodes, so it uses only the standard library.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path


def die_with_us(command: Sequence[str | Path]) -> list[str | Path]:
    """Wrap the command so that it ends with this process. Else it could keep writing files that the next run uses."""
    return ["setpriv", "--pdeathsig", "KILL", "--", *command] if shutil.which("setpriv") else list(command)


def first_line(text: str, otherwise: str = "no reason was given") -> str:
    """The first line of a program's output or of a response; `otherwise` if it is empty."""
    return (text.strip().splitlines() or [otherwise])[0]


def last_line(text: str, otherwise: str = "no reason was given") -> str:
    """The last line of a program's output, which usually gives the reason of a failure; `otherwise` if it is empty."""
    return (text.strip().splitlines() or [otherwise])[-1]


def tail(text: str) -> str:
    """The end of a program's output, for cases in which one line is not enough."""
    return text.strip()[-500:] or "no reason was given"
