"""Other programs: started so that they end with us, and their last words. It runs on nodes too: Python's own modules alone."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path


def die_with_us(command: Sequence[str | Path]) -> list[str | Path]:
    """The command, so started that it does not outlive a killed program and write on where the next run begins anew."""
    return ["setpriv", "--pdeathsig", "KILL", "--", *command] if shutil.which("setpriv") else list(command)


def first_line(text: str, otherwise: str = "it gave no reason") -> str:
    """The first line of a program's output or of an answer; `otherwise` where there is none."""
    return (text.strip().splitlines() or [otherwise])[0]


def last_line(text: str, otherwise: str = "it gave no reason") -> str:
    """The last line of a program's output, which mostly says why it failed; `otherwise` where there is none."""
    return (text.strip().splitlines() or [otherwise])[-1]


def tail(text: str) -> str:
    """The end of a program's output, where one line of it says too little."""
    return text.strip()[-500:] or "it gave no reason"
