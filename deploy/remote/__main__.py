"""Reads one request from stdin, `{"call": "module.function", "arguments": {…}}`, and answers it."""

from __future__ import annotations

import importlib
import json
import sys

from deploy.remote import wire


def main() -> int:
    """Return 0 for a result, 1 for a WorkerError. Other exceptions end with a traceback on stderr."""
    request = json.loads(sys.stdin.buffer.read().decode())
    module, function = request["call"].split(".")
    try:
        result = getattr(importlib.import_module("deploy.remote." + module), function)(request["arguments"])
    except wire.WorkerError as error:
        return _refuse(error)
    except OSError as error:
        return _refuse(wire.of_os(error, str(error.filename or function)))
    wire.say(result=result)
    return 0


def _refuse(error: wire.WorkerError) -> int:
    wire.say(failed={"kind": error.kind, "cause": error.cause, "remedy": error.remedy})
    return 1


if __name__ == "__main__":
    sys.exit(main())
