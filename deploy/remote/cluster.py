"""Ray on a node. `warm` and `nodes` are run by the environment's Python, `cause` by any Python."""

from __future__ import annotations

import os
import re
import threading
from contextlib import suppress
from pathlib import Path

from deploy.remote import wire
from deploy.remote.wire import Json, WorkerError
from gracefarm.process import first_line


def warm(request: Json) -> Json:
    """Import Ray once. The first import from a network file system may take longer than the timeout of `ray start`."""
    del request
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise WorkerError(
            "install", f"ray cannot be imported: {error}", "run `deploy env matrix`, which tries every import"
        ) from error
    return {}


def nodes(request: Json) -> Json:
    """All nodes that this cluster ever had: address, alive, gpus. `free`: GPUs that Ray has not reserved.

    `address` (host:port), `ip` (of this node), `env` (of the client), `seconds` (timeout). Without a head, Ray's own timeouts
    add up to minutes.
    """
    os.environ.update(request["env"])
    watchdog = threading.Timer(float(request["seconds"]), _give_up, (request["address"], request["seconds"]))
    watchdog.daemon = True
    watchdog.start()
    import ray

    try:
        ray.init(
            address=request["address"],
            _node_ip_address=request["ip"],
            namespace="gracefarm",
            log_to_driver=False,
            logging_level="error",
            configure_logging=False,
        )
    except Exception as error:
        raise WorkerError(
            "engine",
            f"Ray at {request['address']} does not answer: {first_line(str(error), type(error).__name__)}",
            "see Ray's logs with `deploy logs --ray`, then restart Ray with `deploy serve`",
        ) from error
    known = [
        {
            "address": node["NodeManagerAddress"],
            "alive": bool(node["Alive"]),
            "gpus": node["Resources"].get("GPU", 0.0) if node["Alive"] else 0.0,
        }
        for node in ray.nodes()
    ]
    free = ray.available_resources().get("GPU", 0.0)
    ray.shutdown()
    watchdog.cancel()
    return {"nodes": known, "free": free, "version": ray.__version__}


def _give_up(address: str, seconds: float) -> None:
    wire.say(failed={"kind": "engine", "cause": f"Ray at {address} does not answer within {seconds:g} s", "remedy": ""})
    os._exit(1)


_FATAL = re.compile(
    r"\bC \d+ \d+\]|Check failed|\[fatal|Traceback|Timed out waiting|Address already in use|No space left|"
    r"cannot allocate|Fatal|\bE \d+ \d+\]|Error:|Authentication",
    re.IGNORECASE,
)
_FILES = (
    "raylet.out",
    "raylet.err",
    "gcs_server.out",
    "gcs_server.err",
    "dashboard_agent.log",
    "dashboard.log",
    "monitor.log",
)
"Logs in the order in which they are searched for a cause."


def cause(request: Json) -> Json:
    """The first line of each of Ray's logs that looks like a cause. `temp`: Ray's temporary folder. `since`: Unix time."""
    folder = Path(request["temp"]) / "session_latest" / "logs"
    lines = []
    for name in _FILES:
        path = folder / name
        with suppress(OSError):
            text = path.read_text(errors="replace") if path.stat().st_mtime >= request["since"] else ""
            fatal = next((line.strip() for line in text.splitlines() if _FATAL.search(line)), None)
            if fatal:
                lines.append(f"{name}: {fatal[:300]}")
    return {"lines": lines}
