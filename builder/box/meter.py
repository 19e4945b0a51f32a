"""What a tree of processes uses: its memory bound, its peak memory, its CPU time; and how much memory this machine can give.

The bound is the kernel's where a memory cgroup of version 2 can be made, else a watchdog's. Never RLIMIT_AS: address
space is not memory, and qemu and nvcc reserve much more of it than they use.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import psutil

from builder.box import cgroup
from gracefarm.errors import HostError

MemoryBy = Literal["cgroup2", "watchdog"]
KINDS: tuple[MemoryBy, ...] = ("cgroup2", "watchdog")
"In the order of preference."


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One look at a tree of processes."""

    memory: int
    "Bytes of anonymous and shared memory now (tmpfs included, page cache not)."
    cpu_s: float
    "CPU seconds used so far, as far as this meter sees them."
    over: bool
    "The tree has passed its bound: the kernel killed a process of it for memory, or the watchdog saw it."


class Meter(Protocol):
    """Bounds and measures one tree of processes, from `attach` to `close`."""

    by: MemoryBy

    def attach(self, pid: int) -> None:
        """Take in process `pid`, which has no children yet."""

    def read(self) -> Reading:
        """Look once; valid after the tree's end too, where `by` is a cgroup."""

    def close(self) -> None:
        """Leave nothing behind. The tree has ended."""


def open_meter(bound: int, kinds: Sequence[MemoryBy] = KINDS) -> Meter:
    """The first of `kinds` that works here, tried for real, with a bound of `bound` bytes.

    Raises:
        HostError: none does (the watchdog always does).
    """
    if "cgroup2" in kinds and (folder := _bounded_cgroup(bound)):
        return Cgroup(folder)
    if "watchdog" in kinds:
        return Watchdog(bound)
    raise HostError(
        f"no way to bound memory here by {' or '.join(kinds)}", remedy="run `builder doctor`, or allow the watchdog too"
    )


def available_memory() -> int:
    """Bytes that a build may use: the least of the kernel's MemAvailable and what each memory cgroup above us has left."""
    rooms = [room for level in cgroup.levels() if (room := cgroup.room(level)) is not None]
    return min([psutil.virtual_memory().available, *rooms])


def cpu_quota() -> float | None:
    """Processors' worth of time that the cgroups above us allow, as a container's --cpus; None: no limit."""
    limits = [
        cgroup.read(folder / "cpu.max", "max").split() for folder in cgroup.levels()
    ]  # microseconds per period of microseconds
    return min((int(limit[0]) / int(limit[1]) for limit in limits if limit[0] != "max"), default=None)


@dataclass(kw_only=True)
class Usage:
    """What this process and its children used between two moments; complete after `watch`."""

    cpu_s: float = 0.0
    peak_memory: int = 0
    "Bytes, sampled."


@contextlib.contextmanager
def watch() -> Iterator[Usage]:
    """Measure what runs in this process, children included, while the block runs."""
    usage, ended, us = Usage(), threading.Event(), psutil.Process()
    before = _cpu_of(us)

    def look() -> None:
        usage.peak_memory = max(usage.peak_memory, sum(map(_memory_of, _tree(os.getpid()))))

    def sample() -> None:
        while not ended.wait(_SAMPLE):
            look()

    look()
    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield usage
    finally:
        ended.set()
        sampler.join()
        look()
        usage.cpu_s = _cpu_of(us) - before


_SAMPLE = 0.2
"Seconds, as the sandbox's."


# --- cgroups -----------------------------------------------------------------------------------------------------------------


class Cgroup:
    """A cgroup of version 2."""

    by: MemoryBy = "cgroup2"

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def attach(self, pid: int) -> None:
        """Move `pid` into the cgroup; its children are born there."""
        (self._folder / "cgroup.procs").write_text(str(pid))

    def read(self) -> Reading:
        """See Meter."""
        stat = cgroup.numbers(self._folder / "memory.stat")
        return Reading(
            memory=stat.get("anon", 0) + stat.get("shmem", 0),
            cpu_s=cgroup.numbers(self._folder / "cpu.stat").get("usage_usec", 0) / 1e6,
            over=cgroup.numbers(self._folder / "memory.events").get("oom_kill", 0) > 0,
        )

    def close(self) -> None:
        """Remove the cgroup."""
        cgroup.remove(self._folder)


def _bounded_cgroup(bound: int) -> Path | None:
    """A new memory cgroup with the bound set, or None where the kernel, its mounts or our rights do not allow one."""
    for parent in cgroup.parents():
        folder = cgroup.new(parent)
        if folder is None:
            continue
        try:
            (folder / "memory.max").write_text(str(bound))
            # Without this a build that passes its bound crawls through swap. The file is absent where swap is not counted.
            with contextlib.suppress(FileNotFoundError):
                (folder / "memory.swap.max").write_text("0")
            cgroup.try_to_move(folder)
        except OSError:
            cgroup.remove(folder)
            continue
        return folder
    return None


# --- watchdog ----------------------------------------------------------------------------------------------------------------

_TMPFS = ("tmp", "home/build", "dev/shm")
_PSS = re.compile(r"^Pss: +(\d+) kB", re.MULTILINE)


class Watchdog:
    """Sums the tree's memory from /proc; whoever reads it kills the tree when it is over the bound."""

    by: MemoryBy = "watchdog"

    def __init__(self, bound: int) -> None:
        self._bound = bound
        self._pid = 0

    def attach(self, pid: int) -> None:
        """Watch `pid` and its descendants: all of a PID namespace, where orphans become children of its first process."""
        self._pid = pid

    def read(self) -> Reading:
        """See Meter. Nothing is left to read after the tree's end."""
        tree = _tree(self._pid)
        memory = sum(map(_memory_of, tree)) + _tmpfs_bytes(self._pid)
        return Reading(memory=memory, cpu_s=sum(map(_cpu_of, tree)), over=memory > self._bound)

    def close(self) -> None:
        """Nothing was made."""


def _tree(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _memory_of(process: psutil.Process) -> int:
    """Proportional set size, which counts a page that forks share once; resident size where the kernel hides it."""
    try:
        return 1024 * int(_PSS.findall(Path(f"/proc/{process.pid}/smaps_rollup").read_text())[0])
    except (OSError, IndexError):
        with contextlib.suppress(psutil.Error):
            return int(process.memory_info().rss)
    return 0


def _cpu_of(process: psutil.Process) -> float:
    """CPU seconds of a process and of its ended, waited-for children."""
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system + times.children_user + times.children_system)


def _tmpfs_bytes(pid: int) -> int:
    """Memory in the sandbox's own tmpfs mounts, which belongs to no process."""
    root = Path(f"/proc/{pid}/root")
    used: dict[int, int] = {}
    for folder in (root, *(root / name for name in _TMPFS)):
        with contextlib.suppress(OSError):
            device = folder.stat().st_dev
            used.setdefault(device, 0 if folder is root else psutil.disk_usage(str(folder)).used)
    return sum(used.values())
