"""Collects data from a node for `deploy collect`: logs, kernel messages about GPUs, state of the GPUs."""

from __future__ import annotations

import base64
import glob
import os
import shutil
import subprocess
import time
import zlib
from pathlib import Path

from deploy.remote import stacks
from deploy.remote.wire import Json, event

TAIL = 4 << 20
"Maximum bytes from the end of each log; from its beginning: HEAD."
HEAD = 256 << 10

COMMANDS = {
    "nvidia-smi.txt": ["nvidia-smi", "-q"],
    "processes.txt": ["ps", "-eo", "pid,ppid,user,stat,etime,rss,args", "--sort=-rss"],
    "disk.txt": ["df", "-hT"],
    "memory.txt": ["free", "-m"],
    "sockets.txt": ["ss", "-ltnp"],
    "environment-limits.txt": ["sh", "-c", "ulimit -a"],
}


def gather(request: Json) -> Json:
    """Send the content of `files` ([{name, pattern}], shell patterns) and the output of COMMANDS, compressed, one event each.

    `prefix` (of the marks of our processes) and `environment` (folder of the active one) are for the stacks of an engine.
    """
    count = 0
    for wanted in request["files"]:
        for path in sorted(glob.glob(wanted["pattern"], recursive=True)):  # noqa: PTH207 - the pattern may be absolute
            if Path(path).is_file():
                name = Path(path).name if "*" not in wanted["pattern"] else _below(path, wanted["pattern"])
                try:
                    _say(f"{wanted['name']}/{name}", ends(Path(path)), Path(path).stat().st_mtime)
                    count += 1
                except OSError as error:
                    event("unread", name=path, cause=os.strerror(error.errno or 0).lower())
    for name, command in COMMANDS.items():
        _say(name, _output(command), time.time())
    _say("stacks.txt", stacks.dump(request["prefix"], request["environment"]).encode(), time.time())
    _say("dmesg-gpu.txt", kernel().encode(), time.time())
    return {"files": count}


def _say(name: str, content: bytes, modified: float) -> None:
    event("file", name=name, modified=modified, data=base64.b64encode(zlib.compress(content)).decode())


def kernel() -> str:
    """Lines of the kernel's log about GPUs (NVRM, Xid), killed processes and machine checks."""
    prefix = ["sudo", "-n"] if os.geteuid() and shutil.which("sudo") else []
    for command in (["dmesg", "--time-format", "iso"], ["journalctl", "-k", "-o", "short-iso", "--no-pager", "-n", "20000"]):
        text = _output([*prefix, *command]).decode(errors="replace")
        words = ("NVRM", "Xid", "Out of memory", "oom-kill", "Killed process", "Machine check", "nvidia", "NFS", "nfs:")
        if "\n" in text and not text.startswith("("):
            return "\n".join(line for line in text.splitlines() if any(word in line for word in words)) + "\n"
    return "(this user cannot read the kernel's log)\n"


def _below(path: str, pattern: str) -> str:
    fixed = pattern.split("*")[0]
    return path[len(fixed[: fixed.rfind("/") + 1]) :]


def ends(path: Path) -> bytes:
    """The content of a file; of a long file, only its first and last lines."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        if size <= HEAD + TAIL:
            return stream.read()
        start = stream.read(HEAD)
        stream.seek(size - TAIL)
        end = stream.read()
    # Only complete lines, since half of a secret would not be redacted.
    start = start[: start.rfind(b"\n") + 1]
    end = end[end.find(b"\n") + 1 :]
    return start + b"[... %d bytes left out ...]\n" % (size - len(start) - len(end)) + end


def _output(command: list[str]) -> bytes:
    try:
        process = subprocess.run(command, capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"({command[0]}: {error})\n".encode()
    return process.stdout + process.stderr if process.returncode == 0 else b"(" + process.stderr.strip() + b")\n"
