"""Cgroups of version 2: our own and its parents, their limits, and new child groups."""

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
    """Move our process into a cgroup. Permission to create a cgroup does not include permission to move there.

    Raises:
        OSError: the kernel refuses.
    """
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, env={"PATH": os.defpath}) as process:
        (folder / "cgroup.procs").write_text(str(process.pid))


def parents() -> Iterator[Path]:
    """The cgroups in which a child may be created.

    A cgroup with processes cannot have limited children, so search upwards, but do not leave a limit that others have set.
    """
    for folder in levels():
        yield folder
        if read(folder / "memory.max", "max") != "max":
            return


def levels() -> list[Path]:
    """Our cgroup and its visible parents."""
    own = own_cgroup()
    if own is None:
        return []
    folder, mount = own
    return [level for level in (folder, *folder.parents) if level.is_relative_to(mount)]


def own_cgroup() -> tuple[Path, Path] | None:
    """The folder of our cgroup, and its mount point."""
    path = own_path(Path("/proc/self/cgroup").read_text())
    mount = mount_of(Path("/proc/self/mountinfo").read_text())
    if path is None or mount is None:
        return None
    visible, point = mount
    # In a container without a cgroup namespace, the mount shows only a part of the hierarchy.
    if not Path(path).is_relative_to(visible):
        return None
    folder = point / Path(path).relative_to(visible)
    return (folder, point) if folder.is_dir() else None


def own_path(cgroup: str) -> str | None:
    """Our path in /proc/self/cgroup (cgroups(7)): `0::path`; lines with controllers belong to version 1."""
    return next((line.removeprefix("0::") for line in cgroup.splitlines() if line.startswith("0::")), None)


def mount_of(mountinfo: str) -> tuple[str, Path] | None:
    """Visible root and mount point of the hierarchy in /proc/self/mountinfo (proc(5))."""
    for line in mountinfo.splitlines():
        left, right = line.split(" - ", 1)
        if right.startswith("cgroup2 "):
            return left.split(" ")[3], Path(left.split(" ")[4])
    return None


def new(parent: Path) -> Path | None:
    """Create a child of `parent`, named after this process, so that a later process can remove it if this one is killed."""
    sweep(parent)
    try:
        return Path(tempfile.mkdtemp(prefix=f"{PREFIX}-{os.getpid()}-{start_time(os.getpid())}-", dir=parent))
    except OSError:
        return None


def sweep(parent: Path) -> None:
    """Remove the cgroups of builders that no longer run."""
    for folder in parent.glob(f"{PREFIX}-*"):
        match = _NAME.fullmatch(folder.name)
        if match and start_time(int(match[1])) != int(match[2]):
            with contextlib.suppress(OSError):
                folder.rmdir()


def start_time(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot. With the process id, it identifies the process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[19])


def remove(folder: Path) -> None:
    """Remove a cgroup. A process that has just ended may keep it busy for a moment."""
    for _ in range(100):
        if not folder.exists():
            return
        with contextlib.suppress(OSError):
            folder.rmdir()
            continue
        time.sleep(0.02)


def room(folder: Path) -> int | None:
    """Bytes left in a cgroup: its limit minus memory that cannot be reclaimed; None without a limit."""
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
    """Read a file of `key number` lines; empty if it is unreadable."""
    pairs = (line.split() for line in read(path, "").splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) > 1 and pair[1].isdecimal()}
