"""A lock for several nodes on a shared file system, where flock may have no effect (huggingface_hub#4306).

The lock has generations instead of one file. A process that sees generation N released or dead creates N+1 with link(2), which
succeeds for only one client; the highest generation is the owner. Files of an owner are never removed, so two processes cannot
both believe that they have the lock. An owner that was wrongly considered dead finds a higher generation (`still_mine`) before
it commits. If the answer of NFS is lost, a successful link may return an error, so the link count is checked.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from deploy.remote.wire import WorkerError

BEAT = 5.0
"Seconds between signs of life of an owner."
PATIENCE = 90.0
"Seconds without one until an owner on another node counts as dead. NFS clients cache attributes for up to 60 s (acregmax)."


class SharedLock:
    """Locks `folder` within a `with` block. The folder is created."""

    def __init__(
        self, folder: Path, *, on_wait: Callable[[str], None] = lambda _owner: None, give_up: float | None = None
    ) -> None:
        self.folder = folder
        self.number = 0
        self._on_wait, self._give_up = on_wait, give_up
        self._mark = {**_identity(), "token": uuid.uuid4().hex}
        self._stop = threading.Event()
        self._heart = threading.Thread(target=self._live, daemon=True)

    def __enter__(self) -> SharedLock:
        """Take the lock. Raises WorkerError("busy") if another process has it for more than `give_up` seconds."""
        self.folder.mkdir(parents=True, exist_ok=True)
        started, told = time.monotonic(), False
        seen: tuple[int, object, float] = (-1, None, 0.0)
        while True:
            highest = self._highest()
            if highest == 0 or self._released(highest) or self._dead(highest, seen):
                if self._take(highest + 1):
                    break
                continue
            beat = self._pulse(highest)
            if seen[:2] != (highest, beat):
                seen = (highest, beat, time.monotonic())
            if not told:
                told = True
                self._on_wait(self.owner(highest))
            if self._give_up is not None and time.monotonic() - started > self._give_up:
                raise WorkerError(
                    "busy", f"{self.owner(highest)} has locked {self.folder.name}", "wait, then repeat the command"
                )
            time.sleep(0.2)
        self._heart.start()
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        self._stop.set()
        self._heart.join()
        (self.folder / f"{self.number:08}.released").touch()

    def still_mine(self) -> bool:
        """Whether this process still has the lock. To be checked immediately before a commit."""
        return self._highest() == self.number

    def owner(self, number: int) -> str:
        """The owner of generation `number`, for messages."""
        mark = self._read(number)
        return f"{mark.get('host', 'another node')} (process {mark.get('pid', '?')})"

    def _highest(self) -> int:
        return max((int(file.name) for file in self.folder.iterdir() if file.name.isdigit()), default=0)

    def _released(self, number: int) -> bool:
        return (self.folder / f"{number:08}.released").exists()

    def _read(self, number: int) -> dict[str, Any]:
        try:
            value = json.loads((self.folder / f"{number:08}").read_text())
        except (OSError, ValueError):
            return {}
        return value if isinstance(value, dict) else {}

    def _pulse(self, number: int) -> object:
        try:
            return (self.folder / f"{number:08}").stat().st_mtime_ns
        except OSError:
            return None

    def _dead(self, number: int, seen: tuple[int, object, float]) -> bool:
        """Whether its process on this machine has ended, or it gave no sign of life for PATIENCE seconds of our clock."""
        mark, here = self._read(number), _identity()
        if all(mark.get(key) == here[key] for key in ("boot", "pids")):
            return _started(int(mark.get("pid", 0))) != mark.get("started")
        same = seen[0] == number and seen[1] == self._pulse(number)
        return same and time.monotonic() - seen[2] > PATIENCE

    def _take(self, number: int) -> bool:
        mine = self.folder / f".{self._mark['token']}"
        mine.write_text(json.dumps(self._mark))
        try:
            os.link(mine, self.folder / f"{number:08}")
        except OSError:
            if mine.stat().st_nlink != 2:
                return False
        finally:
            mine.unlink()
        self.number = number
        if self._highest() != number:  # the listing was outdated
            (self.folder / f"{number:08}").unlink()
            return False
        for file in self.folder.iterdir():
            generation = file.name.partition(".")[0]
            if generation.isdigit() and int(generation) < number:
                file.unlink(missing_ok=True)
        return True

    def _live(self) -> None:
        while not self._stop.wait(BEAT):
            try:
                os.utime(self.folder / f"{self.number:08}")
            except OSError:
                return


def _identity() -> dict[str, object]:
    return {
        "host": socket.gethostname(),
        "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        "pids": str(Path("/proc/self/ns/pid").readlink()),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
    }


def _started(pid: int) -> str | None:
    """Start of a process in clock ticks since boot, to detect a reused process id; None if there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]
