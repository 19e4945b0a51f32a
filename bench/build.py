"""Measures the time outside of compilers in a `builder build causal_conv1d` with filled caches. Takes about ten minutes."""

from __future__ import annotations

import ctypes
import os
import threading
from pathlib import Path

from bench.builder import Bed, builder, make_bed, timed
from builder.proof import record
from gracefarm.files import remove_tree


def union(intervals: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, end = 0.0, 0.0
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


class Opened:
    """Counts with inotify how often a file is opened. This includes an emulated Python, since it also uses the kernel."""

    IN_OPEN = 0x20

    def __init__(self, path: Path) -> None:
        self.count = 0
        libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = libc.inotify_init1(0)
        if libc.inotify_add_watch(self._descriptor, os.fsencode(path), self.IN_OPEN) < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        """Read events without delay, since the kernel merges equal events that wait. One event of a file is 16 bytes."""
        while events := os.read(self._descriptor, 4096):
            self.count += len(events) // 16


def torch_module(bed: Bed) -> Path:
    """A file that every import of torch opens. No other step of a build opens it."""
    [cached] = bed.ground.environment.rglob("torch/__pycache__/__init__.cpython-*.pyc")
    return cached


def whole_build(bed: Bed) -> tuple[float, float]:
    """Wall time of `builder build causal_conv1d` with filled caches, and the time in which a compiler ran (by ninja's log)."""
    remove_tree(record.folder(bed.settings, bed.plan.build_id))
    wall = timed(lambda: builder("build", "causal_conv1d", "--keep", "--no-compiler-cache"))
    logs = list((record.folder(bed.settings, bed.plan.build_id) / "work").rglob(".ninja_log"))
    rows = [line.split("\t") for log in logs for line in log.read_text().splitlines() if not line.startswith("#")]
    return wall, union([(int(row[0]) / 1000, int(row[1]) / 1000) for row in rows])


def main() -> None:
    """Measure and print."""
    bed = make_bed()
    opened = Opened(torch_module(bed))
    wall, compiling = whole_build(bed)
    print(f"build causal_conv1d {wall:.0f} s, in compilers {compiling:.0f} s, the rest {wall - compiling:.0f} s")
    print(f"imports of torch    {opened.count}")
