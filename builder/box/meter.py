"""Memory limit, peak memory and CPU time of a process tree; available memory of this machine.

The kernel enforces the limit if a memory cgroup of version 2 can be created, else a watchdog does. RLIMIT_AS is not used,
since qemu and nvcc reserve much more address space than memory.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import psutil

from builder.box import cgroup
from gracefarm.errors import HostError

MemoryBy = Literal["cgroup2", "watchdog"]
KINDS: tuple[MemoryBy, ...] = ("cgroup2", "watchdog")
"In order of preference."


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Figures of a process tree at one moment."""

    memory: int
    "Bytes of anonymous and shared memory (with tmpfs, without page cache)."
    cpu_s: float
    "CPU seconds so far, as visible to this meter."
    over: bool
    "Whether the tree has exceeded its limit: the kernel killed one of its processes, or the watchdog noticed it."


class Meter(Protocol):
    """Limits and measures a process tree from `attach` to `close`."""

    by: MemoryBy

    def attach(self, pid: int) -> None:
        """Add the process `pid`, which has no children yet."""

    def read(self) -> Reading:
        """Measure once. With a cgroup, this also works after the end of the tree."""

    def close(self) -> None:
        """Clean up after the end of the tree."""


def open_meter(bound: int, kinds: Sequence[MemoryBy] = KINDS) -> Meter:
    """The first of `kinds` that works on this machine, with a limit of `bound` bytes.

    Raises:
        HostError: none works (the watchdog always works).
    """
    if "cgroup2" in kinds and (folder := _bounded_cgroup(bound)):
        return Cgroup(folder)
    if "watchdog" in kinds:
        return Watchdog(bound)
    raise HostError(
        f"this machine cannot limit memory by {' or '.join(kinds)}",
        remedy="give this user permission to write to the cgroup (version 2) of the command",
    )


def available_memory() -> int:
    """Bytes that a build may use: the minimum of MemAvailable and the free memory of each memory cgroup above us."""
    rooms = [room for level in cgroup.levels() if (room := cgroup.room(level)) is not None]
    return min([psutil.virtual_memory().available, *rooms])


def cpu_quota() -> float | None:
    """Number of processors that the cgroups above us allow, such as a container's --cpus; None: no limit."""
    limits = [
        cgroup.read(folder / "cpu.max", "max").split() for folder in cgroup.levels()
    ]  # microseconds per period in microseconds
    return min((int(limit[0]) / int(limit[1]) for limit in limits if limit[0] != "max"), default=None)


@dataclass(kw_only=True)
class Usage:
    """Resources that this process and its children used during `watch`; complete after it."""

    cpu_s: float = 0.0
    peak_memory: int = 0
    "Peak bytes, sampled."


@contextlib.contextmanager
def watch() -> Iterator[Usage]:
    """Measure this process and its children during the block."""
    usage, ended, us = Usage(), threading.Event(), psutil.Process()
    before, sizes = _cpu_of(us), _Sizes()

    def look() -> None:
        usage.peak_memory = max(usage.peak_memory, sizes.read(_tree(os.getpid())))

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
"Sampling interval in seconds, as in the sandbox."


# --- cgroups -----------------------------------------------------------------------------------------------------------------


class Cgroup:
    """A cgroup of version 2."""

    by: MemoryBy = "cgroup2"

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def attach(self, pid: int) -> None:
        """Move `pid` into the cgroup; its children inherit the cgroup."""
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
    """Create a memory cgroup with the limit; None if the kernel, its mounts or our permissions do not allow one."""
    for parent in cgroup.parents():
        folder = cgroup.new(parent)
        if folder is None:
            continue
        try:
            (folder / "memory.max").write_text(str(bound))
            # Else a build above its limit would use swap and become very slow. The file does not exist if swap is not counted.
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
    """Sums the tree's memory from /proc. The reader kills the tree if it exceeds the limit."""

    by: MemoryBy = "watchdog"

    def __init__(self, bound: int) -> None:
        self._bound = bound
        self._pid = 0
        self._sizes = _Sizes()

    def attach(self, pid: int) -> None:
        """Watch `pid` and its descendants: in a PID namespace, orphans become children of its first process."""
        self._pid = pid

    def read(self) -> Reading:
        """See Meter. This does not work after the end of the tree."""
        tree = _tree(self._pid)
        tmpfs = _tmpfs_bytes(self._pid)
        memory = tmpfs + self._sizes.read(tree, self._bound - tmpfs)
        return Reading(memory=memory, cpu_s=sum(map(_cpu_of, tree)), over=memory > self._bound)

    def close(self) -> None:
        """Nothing to clean up."""


def _tree(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


@dataclass(frozen=True, kw_only=True)
class _Size:
    """Size of one process, by its last exact reading."""

    proportional: int
    resident: int
    due: float
    "Time of the next exact reading."


class _Sizes:
    """Memory of a process tree: proportional sizes, which the kernel computes by a walk over all pages (70 ms for 3 GiB)."""

    SHARE = 0.02
    "Share of a processor that may go into proportional sizes."

    def __init__(self) -> None:
        self._sizes: dict[psutil.Process, _Size] = {}

    def read(self, tree: Sequence[psutil.Process], bound: int | None = None) -> int:
        """Bytes: exact if the tree may exceed the bound, else with the growth since the last exact readings.

        Of that growth all counts, although a part may be shared with other processes.
        """
        # Resident sizes are cheap, and never smaller than proportional ones.
        residents = {process: _resident(process) for process in tree}
        now = time.monotonic() if bound is None or sum(residents.values()) <= bound else math.inf
        memory, sizes = 0, {}
        for process, resident in residents.items():
            size = self._sizes.get(process)
            if size is None or now >= size.due:
                start = time.thread_time()
                exact = proportional_size(process)
                wait = (time.thread_time() - start) * len(tree) / self.SHARE
                size = _Size(proportional=exact, resident=resident, due=time.monotonic() + wait)
            sizes[process] = size
            memory += size.proportional + max(0, resident - size.resident)
        self._sizes = sizes
        return memory


def proportional_size(process: psutil.Process) -> int:
    """Proportional set size, which counts shared pages once; resident size if the kernel hides it."""
    try:
        return 1024 * int(_PSS.findall(Path(f"/proc/{process.pid}/smaps_rollup").read_text())[0])
    except (OSError, IndexError):
        return _resident(process)


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0


def _cpu_of(process: psutil.Process) -> float:
    """CPU seconds of a process and of its reaped children."""
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system + times.children_user + times.children_system)


def _tmpfs_bytes(pid: int) -> int:
    """Memory of the sandbox's tmpfs mounts, which is not part of any process."""
    root = Path(f"/proc/{pid}/root")
    used: dict[int, int] = {}
    for folder in (root, *(root / name for name in _TMPFS)):
        with contextlib.suppress(OSError):
            device = folder.stat().st_dev
            used.setdefault(device, 0 if folder is root else psutil.disk_usage(str(folder)).used)
    return sum(used.values())
