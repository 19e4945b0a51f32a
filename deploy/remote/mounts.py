"""Parses /proc/mounts, /etc/fstab and /proc/fs/nfsfs/volumes (fstab(5), mount(8), fs/nfs/client.c); free space."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from deploy.remote.wire import Json

NFS = ("nfs", "nfs4")
NETWORK = (*NFS, "virtiofs", "9p", "cifs", "ceph", "lustre", "glusterfs", "fuse.glusterfs", "fuse.sshfs", "beegfs", "gpfs")
"Network file systems. All other file systems count as local."

_ESCAPE = re.compile(r"\\([0-7]{3})")
_ENTRY = re.compile(r"(?P<before>\s*[^\s#]\S*\s+(?P<target>\S+)\s+(?P<kind>\S+)\s+)(?P<options>\S+)")


class Mount(NamedTuple):
    """One line of /proc/mounts."""

    source: str
    target: str
    kind: str

    @property
    def network(self) -> bool:
        """True for a network file system."""
        return self.kind in NETWORK


def unescape(text: str) -> str:
    r"""Replace the escapes of fstab, such as \040 for a space."""
    return _ESCAPE.sub(lambda escape: chr(int(escape.group(1), 8)), text)


def current() -> list[Mount]:
    """The mounts in the order of /proc/mounts. A later line hides an earlier one with the same target."""
    rows = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    return [Mount(unescape(row[0]), unescape(row[1]), row[2]) for row in rows]


def mount_of(path: str | Path) -> Mount | None:
    """The mount of a path."""
    real = os.path.realpath(path).rstrip("/") + "/"
    holding = [mount for mount in current() if real.startswith(mount.target.rstrip("/") + "/")]
    return max(reversed(holding), key=lambda mount: len(mount.target), default=None)


def cached_volumes(text: str) -> dict[str, bool]:
    """FSC by device (major:minor, as in st_dev), from /proc/fs/nfsfs/volumes. Linux 5 did not change its columns."""
    rows = [line.split() for line in text.splitlines()]
    volumes = [dict(zip(rows[0], row, strict=False)) for row in rows[1:]]
    return {volume["DEV"]: volume.get("FSC") == "yes" for volume in volumes if "DEV" in volume}


def nfs_entry(line: str, target: str) -> re.Match[str] | None:
    """The fields of a line of fstab that mounts NFS at `target`; None for other lines."""
    entry = _ENTRY.match(line)
    if entry and entry["kind"] in NFS and unescape(entry["target"]).rstrip("/") == target.rstrip("/"):
        return entry
    return None


def with_cache(text: str, target: str) -> str:
    """fstab with the option `fsc` in the NFS entry of `target`, if there is one and it does not have the option yet."""
    return "".join(_with_fsc(line, nfs_entry(line, target)) for line in text.splitlines(keepends=True))


def _with_fsc(line: str, entry: re.Match[str] | None) -> str:
    """The line with `fsc` instead of `nofsc`. All other bytes stay."""
    options = entry["options"].split(",") if entry else []
    if entry is None or any(option == "fsc" or option.startswith("fsc=") for option in options):
        return line
    kept = [option for option in options if option != "nofsc"]
    return f"{entry['before']}{','.join([*kept, 'fsc'])}{line[entry.end() :]}"


def lines_before(before: str) -> dict[str, str]:
    """Lines with `fsc` that `with_cache` writes for the fstab `before`, to the lines of `before` that they replace."""
    lines = before.splitlines(keepends=True)
    entries = [match if (match := _ENTRY.match(line)) and match["kind"] in NFS else None for line in lines]
    return {new: line for line, entry in zip(lines, entries, strict=True) if (new := _with_fsc(line, entry)) != line}


def target_of(line: str) -> str:
    """The mount point of an entry of fstab."""
    return unescape(line.split()[1])


def space(path: str | Path) -> Json | None:
    """Total bytes of the file system of `path`, and those that are free for this user."""
    try:
        status = os.statvfs(path)
    except OSError:
        return None
    return {"total": status.f_blocks * status.f_frsize, "free": status.f_bavail * status.f_frsize}


def size(path: Path) -> int | None:
    """Size of a file in bytes; None if it does not exist."""
    try:
        return path.stat().st_size
    except OSError:
        return None


def existing(path: str | Path) -> Path:
    """The path, or its nearest parent that exists."""
    place = Path(path)
    while not place.exists() and place != place.parent:
        place = place.parent
    return place
