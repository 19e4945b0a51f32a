"""The output format of a worker: one JSON object per line on stdout. The last line is the result or the failure."""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
from typing import Any

Json = dict[str, Any]

_speaking = threading.Lock()


class WorkerError(Exception):
    """An error for the user. It becomes the error of the command; `kind` selects its class and exit code."""

    def __init__(self, kind: str, cause: str, remedy: str = "") -> None:
        super().__init__(cause)
        self.kind = kind
        self.cause = cause
        self.remedy = remedy


def say(**fields: Any) -> None:
    """Write one line, from any thread. The work continues if the reader has ended or the disk of the log is full."""
    with _speaking:
        try:
            sys.stdout.write(json.dumps(fields) + "\n")
            sys.stdout.flush()
        except OSError:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123


def event(kind: str, /, **fields: Any) -> None:
    """Report an event during the work."""
    say(event=kind, **fields)


def of_os(error: OSError, where: str) -> WorkerError:
    """The error for an OSError."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return WorkerError(
            "disk", "no space left on the file system of " + where, "free space on this file system, then repeat the command"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return WorkerError(
            "node",
            where + ": " + os.strerror(error.errno).lower(),
            "give the user of the ssh connection permission to write to this path",
        )
    if error.errno == errno.ESTALE:
        return WorkerError(
            "node",
            where + ": the shared folder was unmounted (stale file handle)",
            "mount the shared folder again on this node",
        )
    return WorkerError("node", f"{where}: {error}", "")
