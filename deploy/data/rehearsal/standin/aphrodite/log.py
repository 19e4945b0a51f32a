"""The engine logs through rich, which wraps at 80 columns where there is no terminal; whoever reads its log must cope."""

from __future__ import annotations

import os
import sys
import textwrap


def say(message: str, level: str = "INFO") -> None:
    """One message, on as many lines as it takes."""
    width = int(os.environ.get("COLUMNS", "80"))
    head = f"{level}:" + " " * (9 - len(level))
    for line in message.splitlines() or [""]:
        wrapped = textwrap.wrap(head + line, width, break_on_hyphens=False, replace_whitespace=False) or [head]
        sys.stdout.write("\n".join(wrapped) + "\n")
    sys.stdout.flush()


def warn(message: str) -> None:
    """A WARNING."""
    say(message, "WARNING")


def error(message: str) -> None:
    """An ERROR; the engine's logger drops the traceback that belongs to it."""
    say(message, "ERROR")
