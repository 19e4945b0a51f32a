"""A lock that several nodes can trust on a shared file system, where flock may be a no-op (huggingface_hub#4306).

Generations instead of one file: whoever sees generation N released or dead creates N+1 with link(2), which a server does for
one client alone; the highest generation is the owner. No file is ever taken away from under an owner, so there is no moment at
which two may believe to hold the lock, and an owner that was thought dead finds a higher generation (`still_mine`) before it
commits. NFS may answer a link that succeeded with an error, when the answer was lost: the link count tells.
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
"Seconds between an owner's signs of life."
PATIENCE = 90.0
"Seconds without one until another node's owner counts as dead: more than an NFS client may cache attributes (acregmax, 60 s)."


class SharedLock:
    """Hold `folder` (created) exclusively within a `with` block."""

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
        """Raises WorkerError("busy") after `give_up` seconds of somebody else's work."""
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
                    "busy", f"{self.owner(highest)} is at work on {self.folder.name}", "wait for it, then repeat"
                )
            time.sleep(0.2)
        self._heart.start()
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        self._stop.set()
        self._heart.join()
        (self.folder / f"{self.number:08}.released").touch()

    def still_mine(self) -> bool:
        """Nobody has taken over: to be asked right before what was made is committed."""
        return self._highest() == self.number

    def owner(self, number: int) -> str:
        """Who holds generation `number`, for people."""
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
        """Its process is gone from this very machine, or its pulse stood still for PATIENCE by our own clock."""
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
        if self._highest() != number:  # we had read an old listing
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
    """A process's start in clock ticks since boot, so that a reused number is not taken for it; None when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]
