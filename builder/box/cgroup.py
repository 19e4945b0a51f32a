"""Cgroups of version 2: our own and those above it, their limits, and new ones below."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PREFIX = "gracefarm"
_NAME = re.compile(rf"{PREFIX}-(\d+)-(\d+)-\w+")


def try_to_move(folder: Path) -> None:
    """Move a process of ours into a cgroup: the right to make one is not yet the right to move there.

    Raises:
        OSError: the kernel refuses.
    """
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, env={"PATH": os.defpath}) as process:
        (folder / "cgroup.procs").write_text(str(process.pid))


def parents() -> Iterator[Path]:
    """Where a child cgroup may be made: no bounded child may stand beside processes, so the way leads up, as far as no limit
    set by others is left behind."""
    for folder in levels():
        yield folder
        if read(folder / "memory.max", "max") != "max":
            return


def levels() -> list[Path]:
    """Our cgroup and those above it, as far as they are seen."""
    own = own_cgroup()
    if own is None:
        return []
    folder, mount = own
    return [level for level in (folder, *folder.parents) if level.is_relative_to(mount)]


def own_cgroup() -> tuple[Path, Path] | None:
    """Our cgroup's folder and the mount it is seen through."""
    path = own_path(Path("/proc/self/cgroup").read_text())
    mount = mount_of(Path("/proc/self/mountinfo").read_text())
    if path is None or mount is None:
        return None
    visible, point = mount
    # In a container without a cgroup namespace the mount shows a part of the hierarchy only.
    if not Path(path).is_relative_to(visible):
        return None
    folder = point / Path(path).relative_to(visible)
    return (folder, point) if folder.is_dir() else None


def own_path(cgroup: str) -> str | None:
    """Our path in /proc/self/cgroup (cgroups(7)): `0::path`; lines with controllers are version 1's."""
    return next((line.removeprefix("0::") for line in cgroup.splitlines() if line.startswith("0::")), None)


def mount_of(mountinfo: str) -> tuple[str, Path] | None:
    """Visible root and mount point of the hierarchy in /proc/self/mountinfo (proc(5))."""
    for line in mountinfo.splitlines():
        left, right = line.split(" - ", 1)
        if right.startswith("cgroup2 "):
            return left.split(" ")[3], Path(left.split(" ")[4])
    return None


def new(parent: Path) -> Path | None:
    """A new child of `parent`, named after this process so that the next one can sweep it when this one is killed."""
    sweep(parent)
    try:
        return Path(tempfile.mkdtemp(prefix=f"{PREFIX}-{os.getpid()}-{start_time(os.getpid())}-", dir=parent))
    except OSError:
        return None


def sweep(parent: Path) -> None:
    """Remove the cgroups of builders that are gone."""
    for folder in parent.glob(f"{PREFIX}-*"):
        match = _NAME.fullmatch(folder.name)
        if match and start_time(int(match[1])) != int(match[2]):
            with contextlib.suppress(OSError):
                folder.rmdir()


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot: with the id it names a process for good."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[19])


def remove(folder: Path) -> None:
    """Remove a cgroup; a process that has just ended keeps it busy for a moment."""
    for _ in range(100):
        if not folder.exists():
            return
        with contextlib.suppress(OSError):
            folder.rmdir()
            continue
        time.sleep(0.02)


def room(folder: Path) -> int | None:
    """Bytes left in one cgroup, its limit less what it cannot give back; None where it has no limit."""
    limit = read(folder / "memory.max", "max")
    if limit == "max":
        return None
    stat = numbers(folder / "memory.stat")
    cache = stat.get("inactive_file", 0) + stat.get("active_file", 0)
    return max(0, int(limit) - max(0, int(read(folder / "memory.current", "0")) - cache))


def read(path: Path, default: str) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return default


def numbers(path: Path) -> dict[str, int]:
    """A file of `key number` lines; empty where it cannot be read."""
    pairs = (line.split() for line in read(path, "").splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) > 1 and pair[1].isdecimal()}
