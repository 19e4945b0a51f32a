"""The current state of a node, for `status` and `top`, and the ends of its logs, for `logs`."""

from __future__ import annotations

import csv
import glob
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from deploy.remote import facts, marked, mounts
from deploy.remote.wire import Json, event
from gracefarm.process import first_line

BLOCK = 1 << 18
POLL = 0.3
BEAT = 5.0
PATIENCE = 5.0
"Timeout for a file system in seconds."
QUERY = ("name", "memory.used", "memory.total", "utilization.gpu", "temperature.gpu", "power.draw")


def vitals(request: Json) -> Json:
    """The state of this node. `prefix`: of the marks of our processes. `paths`: folders on the file systems to report."""
    processes = marked.processes(request["prefix"])
    disks = {path: _disk(path) for path in request["paths"]}
    return {
        "uptime": float(Path("/proc/uptime").read_text().split()[0]),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "memory": facts.memory(Path("/proc/meminfo").read_text()),
        "disks": [disk for disk in disks.values() if disk],
        "stuck": [path for path, disk in disks.items() if disk is None],
        "raylet": any(process["name"] == "raylet" for process in processes),
        "jobs": sorted({str(process["mark"]).rpartition("/")[2] for process in processes}),
        **gpus(),
    }


def _disk(path: str) -> Json | None:
    """Space on the file system of `path` or its nearest parent; None if it does not answer, such as NFS without its server.

    A child process is used, since it can be killed if it hangs.
    """
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        with suppress(OSError):
            os.write(theirs, json.dumps({"path": path, **(mounts.space(mounts.existing(path)) or {})}).encode())
        os._exit(0)
    os.close(theirs)
    with open(ours, "rb") as stream:  # noqa: PTH123 - a descriptor
        ready, _, _ = select.select([stream], [], [], PATIENCE)
        answer = stream.read() if ready else b""
    if not ready:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0 if ready else os.WNOHANG)
    disk: Json | None = json.loads(answer) if answer else None
    return disk


def gpus() -> Json:
    """The output of nvidia-smi, with a timeout of 10 s. It creates no context on the GPU, and runs in a separate process."""
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except FileNotFoundError:
        return {"gpus": [], "gpu_error": "no nvidia-smi"}
    except subprocess.TimeoutExpired:
        return {"gpus": [], "gpu_error": "nvidia-smi does not answer"}
    if process.returncode:
        return {"gpus": [], "gpu_error": first_line(process.stdout + process.stderr)[:200]}
    rows = csv.reader(process.stdout.splitlines(), skipinitialspace=True)
    return {"gpus": [_gpu(row) for row in rows if len(row) == len(QUERY)], "gpu_error": ""}


def _gpu(row: list[str]) -> Json:
    used, total, busy, heat, power = (_number(field) for field in row[1:])
    return {"name": row[0], "used_mib": used, "total_mib": total, "busy": busy, "celsius": heat, "watts": power}


def _number(text: str) -> float | None:
    """A number; None for `[N/A]`, if a GPU shares the host's memory or has no such sensor."""
    try:
        return float(text)
    except ValueError:
        return None


def tail(request: Json) -> Json:
    """Send the last `lines` of each file of `patterns` ([{name, pattern}]) as events; with `follow`, also new lines.

    `offsets`: bytes of each path that the caller already has. A new file is sent from its beginning. With `follow`, it ends
    when the reader has ended.
    """
    offsets: dict[str, int] = dict(request["offsets"])
    resumed, beat = bool(offsets), time.monotonic()
    for path, name in _files(request["patterns"]):
        if path not in offsets:
            offsets[path] = 0 if resumed else _start(Path(path), int(request["lines"]))
        offsets[path] = _say(path, name, offsets[path], whole=not request["follow"])
    while request["follow"] and not _left():
        time.sleep(POLL)
        for path, name in _files(request["patterns"]):
            offsets[path] = _say(path, name, offsets.get(path, 0), whole=False)
        if time.monotonic() - beat > BEAT:
            event("beat")
            beat = time.monotonic()
    return {"offsets": offsets}


def _files(patterns: list[Json]) -> Iterator[tuple[str, str]]:
    """The files as real paths, so that Ray's `session_latest` gives new files after a restart."""
    for pattern in patterns:
        for path in sorted(glob.glob(pattern["pattern"])):  # noqa: PTH207 - the pattern is absolute
            real = os.path.realpath(path)
            if Path(real).is_file():
                yield real, f"{pattern['name']}{Path(path).name}"


def _start(path: Path, lines: int) -> int:
    """Start of the last `lines` lines, or of the last BLOCK bytes."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        stream.seek(max(0, size - BLOCK))
        block = stream.read(BLOCK)
    ends = [index for index, byte in enumerate(block.rstrip(b"\n")) if byte == 10]
    begin = ends[-lines] + 1 if 0 < lines <= len(ends) else 0 if lines else len(block)
    return size - len(block) + begin


def _say(path: str, name: str, offset: int, *, whole: bool) -> int:
    """Send the lines from `offset`; with `whole`, also an incomplete last line. Return the new offset."""
    with suppress(OSError):
        if Path(path).stat().st_size < offset:  # the file was truncated
            offset = 0
        with Path(path).open("rb") as stream:
            stream.seek(offset)
            while block := stream.read(BLOCK):
                end = len(block) if whole or (len(block) == BLOCK and b"\n" not in block) else block.rfind(b"\n") + 1
                if not end:
                    break
                lines = block[:end].decode(errors="replace").split("\n")
                offset += end
                event("lines", path=path, name=name, offset=offset, lines=lines[: -1 if lines[-1] == "" else None])
                stream.seek(offset)
    return offset


def _left() -> bool:
    """Whether the reader has ended."""
    poll = select.poll()
    poll.register(sys.__stdout__.fileno(), select.POLLERR | select.POLLHUP) if sys.__stdout__ else None
    return bool(poll.poll(0))
