"""How a worker speaks: one JSON object a line on stdout. Events first, the result or the failure last."""

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
    """Something a person can act on; becomes the error of the command that asked. `kind` picks its class and exit code."""

    def __init__(self, kind: str, cause: str, remedy: str = "") -> None:
        super().__init__(cause)
        self.kind = kind
        self.cause = cause
        self.remedy = remedy


def say(**fields: Any) -> None:
    """Write one line; whole lines, also from several threads. A reader that has gone, or a log that is full, stops no work."""
    with _speaking:
        try:
            sys.stdout.write(json.dumps(fields) + "\n")
            sys.stdout.flush()
        except OSError:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123


def event(kind: str, /, **fields: Any) -> None:
    """Something that happened on the way."""
    say(event=kind, **fields)


def of_os(error: OSError, where: str) -> WorkerError:
    """The sentence for what an operating system refuses anywhere."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return WorkerError(
            "disk", "no space left on the file system that holds " + where, "free space there, then repeat the command"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return WorkerError(
            "node", where + ": " + os.strerror(error.errno).lower(), "make it writable for the user that deploys"
        )
    if error.errno == errno.ESTALE:
        return WorkerError("node", where + ": the shared folder went away (stale file handle)", "mount it again on this node")
    return WorkerError("node", f"{where}: {error}", "")
