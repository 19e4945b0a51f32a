"""Logs like the engine, which uses rich: without a terminal, lines are wrapped at 80 columns."""

from __future__ import annotations

import os
import sys
import textwrap


def say(message: str, level: str = "INFO") -> None:
    """Log a message, on one or more lines."""
    width = int(os.environ.get("COLUMNS", "80"))
    head = f"{level}:" + " " * (9 - len(level))
    for line in message.splitlines() or [""]:
        wrapped = textwrap.wrap(head + line, width, break_on_hyphens=False, replace_whitespace=False) or [head]
        sys.stdout.write("\n".join(wrapped) + "\n")
    sys.stdout.flush()


def warn(message: str) -> None:
    """Log a WARNING."""
    say(message, "WARNING")


def error(message: str) -> None:
    """Log an ERROR, without traceback like the engine's logger."""
    say(message, "ERROR")
