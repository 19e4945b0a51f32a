"""What a tree of processes uses: its memory bound, its peak memory, its CPU time; and how much memory this machine can give.

The bound is the kernel's where a memory cgroup can be made (version 2, then 1), else a watchdog's. Never RLIMIT_AS: address
space is not memory, and qemu and nvcc reserve much more of it than they use.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import psutil

from gracefarm.errors import HostError

MemoryBy = Literal["cgroup2", "cgroup1", "watchdog"]
KINDS: tuple[MemoryBy, ...] = ("cgroup2", "cgroup1", "watchdog")
"In the order of preference."

PREFIX = "gracefarm"
_NAME = re.compile(rf"{PREFIX}-(\d+)-(\d+)-\w+")


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
    for kind in kinds:
        if kind == "watchdog":
            return Watchdog(bound)
        if folder := _bounded_cgroup(kind, bound):
            return Cgroup(kind, folder, _cpu_cgroup() if kind == "cgroup1" else folder)
    raise HostError(
        f"no way to bound memory here by {' or '.join(kinds)}", remedy="run `builder doctor`, or allow the watchdog too"
    )


def available_memory() -> int:
    """Bytes that a build may use: the least of the kernel's MemAvailable and what each memory cgroup above us has left."""
    return min(psutil.virtual_memory().available, *_cgroup_rooms(), _NO_LIMIT)


def cpu_quota() -> float | None:
    """Processors' worth of time that the cgroups above us allow, as a container's --cpus; None: no limit."""
    quotas = []
    for kind in ("cgroup2", "cgroup1"):
        own = _own_cgroup("cpu" if kind == "cgroup1" else None)
        if own is not None:
            folder, mount = own
            levels = [level for level in (folder, *folder.parents) if level.is_relative_to(mount)]
            quotas += [quota for level in levels if (quota := _quota(kind, level)) is not None]
    return min(quotas, default=None)


def _quota(kind: MemoryBy, folder: Path) -> float | None:
    """The CPU limit of one cgroup: microseconds per period of microseconds, `max` or -1 without one."""
    if kind == "cgroup2":
        words = _read(folder / "cpu.max", "max").split()
    else:
        words = [_read(folder / f"cpu.cfs_{name}_us", "-1") for name in ("quota", "period")]
    return None if words[0] in ("max", "-1") else int(words[0]) / int(words[1])


@dataclass(kw_only=True)
class Usage:
    """What this process and its children used between two moments; complete after `watch`."""

    cpu_s: float = 0.0
    peak_memory: int = 0
    "Bytes, sampled."


@contextlib.contextmanager
def watch() -> Iterator[Usage]:
    """Measure what runs in this process, children included, while the block runs."""
    usage, done, before = Usage(), threading.Event(), _cpu_of_us()

    def look() -> None:
        usage.peak_memory = max(usage.peak_memory, sum(map(_memory_of, _tree(os.getpid()))))

    def sample() -> None:
        while not done.wait(_SAMPLE):
            look()

    look()
    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield usage
    finally:
        done.set()
        sampler.join()
        look()
        usage.cpu_s = _cpu_of_us() - before


_SAMPLE = 0.2
"Seconds, as the sandbox's."


def _cpu_of_us() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


# --- cgroups -----------------------------------------------------------------------------------------------------------------

_NO_LIMIT = 1 << 62


@dataclass(frozen=True, kw_only=True)
class _Files:
    """What the two versions call the same things."""

    limit: str
    swap_limit: str
    usage: str
    resident: tuple[str, ...]
    cache: tuple[str, ...]
    events: str


_FILES: dict[MemoryBy, _Files] = {
    "cgroup2": _Files(
        limit="memory.max",
        swap_limit="memory.swap.max",
        usage="memory.current",
        resident=("anon", "shmem"),
        cache=("inactive_file", "active_file"),
        events="memory.events",
    ),
    "cgroup1": _Files(
        limit="memory.limit_in_bytes",
        swap_limit="memory.memsw.limit_in_bytes",
        usage="memory.usage_in_bytes",
        resident=("total_rss", "total_shmem"),
        cache=("total_inactive_file", "total_active_file"),
        events="memory.oom_control",
    ),
}


class Cgroup:
    """A memory cgroup, and beside it the cgroup that counts CPU time (the same one in version 2)."""

    def __init__(self, by: MemoryBy, folder: Path, cpu: Path | None) -> None:
        self.by = by
        self._folder = folder
        self._cpu = cpu
        self._folders = {folder} if cpu is None else {folder, cpu}

    def attach(self, pid: int) -> None:
        """Move `pid` into the cgroup; its children are born there."""
        for folder in self._folders:
            (folder / "cgroup.procs").write_text(str(pid))

    def read(self) -> Reading:
        """See Meter."""
        files = _FILES[self.by]
        stat = _numbers(self._folder / "memory.stat")
        return Reading(
            memory=sum(stat.get(key, 0) for key in files.resident),
            cpu_s=self._cpu_s(),
            over=_numbers(self._folder / files.events).get("oom_kill", 0) > 0,
        )

    def _cpu_s(self) -> float:
        if self._cpu is None:
            return 0.0
        if self.by == "cgroup2":
            return _numbers(self._cpu / "cpu.stat").get("usage_usec", 0) / 1e6
        return int((self._cpu / "cpuacct.usage").read_text()) / 1e9

    def close(self) -> None:
        """Remove the cgroups."""
        for folder in self._folders:
            _remove_cgroup(folder)


def _bounded_cgroup(kind: MemoryBy, bound: int) -> Path | None:
    """A new memory cgroup with the bound set, or None where the kernel, its mounts or our rights do not allow one."""
    files = _FILES[kind]
    for parent in _parents(kind):
        folder = _new_cgroup(parent)
        if folder is None:
            continue
        try:
            (folder / files.limit).write_text(str(bound))
            # Without this a build that passes its bound crawls through swap. The file is absent where swap is not counted.
            with contextlib.suppress(FileNotFoundError):
                (folder / files.swap_limit).write_text("0" if kind == "cgroup2" else str(bound))
            _try_to_move(folder)
        except OSError:
            _remove_cgroup(folder)
            continue
        return folder
    return None


def _try_to_move(folder: Path) -> None:
    """Move a process of ours into a cgroup: the right to make one is not yet the right to move there.

    Raises:
        OSError: the kernel refuses.
    """
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, env={"PATH": os.defpath}) as process:
        (folder / "cgroup.procs").write_text(str(process.pid))


def _cpu_cgroup() -> Path | None:
    """A new cgroup that counts CPU time (version 1, where it is a hierarchy of its own)."""
    own = _own_cgroup("cpuacct")
    return _new_cgroup(own[0]) if own else None


def _parents(kind: MemoryBy) -> Iterator[Path]:
    """Where a child cgroup may be made.

    Version 1: in our own. Version 2 forbids bounded children beside processes, so the way leads up, as far as no limit set
    by others is left behind.
    """
    own = _own_cgroup("memory" if kind == "cgroup1" else None)
    if own is None:
        return
    folder, mount = own
    yield folder
    while kind == "cgroup2" and folder != mount:
        if _read(folder / "memory.max", "max") != "max":
            return
        folder = folder.parent
        yield folder


def _own_cgroup(controller: str | None) -> tuple[Path, Path] | None:
    """Our cgroup's folder and the mount it is seen through: of a version 1 controller, or of version 2 (None)."""
    path = _own_path(controller, Path("/proc/self/cgroup").read_text())
    mount = _cgroup_mount(controller, Path("/proc/self/mountinfo").read_text())
    if path is None or mount is None:
        return None
    visible, point = mount
    # In a container without a cgroup namespace the mount shows a part of the hierarchy only.
    if not Path(path).is_relative_to(visible):
        return None
    folder = point / Path(path).relative_to(visible)
    return (folder, point) if folder.is_dir() else None


def _own_path(controller: str | None, cgroup: str) -> str | None:
    """Our path in /proc/self/cgroup (cgroups(7)): `ID:controllers:path`, without controllers for version 2."""
    for line in cgroup.splitlines():
        _, controllers, path = line.split(":", 2)
        if (controller in controllers.split(",")) if controller else not controllers:
            return path
    return None


def _cgroup_mount(controller: str | None, mountinfo: str) -> tuple[str, Path] | None:
    """Visible root and mount point of a cgroup hierarchy in /proc/self/mountinfo (proc(5))."""
    for line in mountinfo.splitlines():
        left, right = line.split(" - ", 1)
        kind, _, options = right.split(" ", 2)
        if kind == "cgroup2" if controller is None else kind == "cgroup" and controller in options.split(","):
            return left.split(" ")[3], Path(left.split(" ")[4])
    return None


def _new_cgroup(parent: Path) -> Path | None:
    """A new child of `parent`, named after this process so that the next one can sweep it when this one is killed."""
    _sweep(parent)
    try:
        return Path(tempfile.mkdtemp(prefix=f"{PREFIX}-{os.getpid()}-{_start_time(os.getpid())}-", dir=parent))
    except OSError:
        return None


def _sweep(parent: Path) -> None:
    """Remove the cgroups of builders that are gone."""
    for folder in parent.glob(f"{PREFIX}-*"):
        match = _NAME.fullmatch(folder.name)
        if match and _start_time(int(match[1])) != int(match[2]):
            with contextlib.suppress(OSError):
                folder.rmdir()


def _start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot: with the id it names a process for good."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[19])


def _remove_cgroup(folder: Path) -> None:
    """Remove a cgroup; a process that has just ended keeps it busy for a moment."""
    for _ in range(100):
        try:
            folder.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.02)
        else:
            return


def _cgroup_rooms() -> Iterator[int]:
    """What each memory cgroup above us has left: its limit less what it cannot give back."""
    for kind in ("cgroup2", "cgroup1"):
        own = _own_cgroup("memory" if kind == "cgroup1" else None)
        if own is None:
            continue
        folder, mount = own
        for level in (folder, *folder.parents):
            if level.is_relative_to(mount) and (room := _room(_FILES[kind], level)) is not None:
                yield room


def _room(files: _Files, folder: Path) -> int | None:
    """Bytes left in one cgroup; None where it has no limit."""
    limit = _read(folder / files.limit, "max")
    if limit == "max":
        return None
    stat = _numbers(folder / "memory.stat")
    cache = sum(stat.get(key, 0) for key in files.cache)
    return max(0, int(limit) - max(0, int(_read(folder / files.usage, "0")) - cache))


def _read(path: Path, default: str) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return default


def _numbers(path: Path) -> dict[str, int]:
    """A file of `key number` lines; empty where it cannot be read."""
    pairs = (line.split() for line in _read(path, "").splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) > 1 and pair[1].isdecimal()}


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
    total = 0
    root_device = _device(Path(f"/proc/{pid}/root"))
    devices = {root_device}
    for name in _TMPFS:
        folder = Path(f"/proc/{pid}/root/{name}")
        device = _device(folder)
        if device is not None and device not in devices:
            devices.add(device)
            with contextlib.suppress(OSError):
                usage = os.statvfs(folder)
                total += (usage.f_blocks - usage.f_bfree) * usage.f_frsize
    return total


def _device(path: Path) -> int | None:
    try:
        return path.stat().st_dev
    except OSError:
        return None
