"""/proc/mounts, /etc/fstab and /proc/fs/nfsfs/volumes as data (fstab(5), mount(8), fs/nfs/client.c), and the room there."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from deploy.remote.wire import Json

NFS = ("nfs", "nfs4")
NETWORK = (*NFS, "virtiofs", "9p", "cifs", "ceph", "lustre", "glusterfs", "fuse.glusterfs", "fuse.sshfs", "beegfs", "gpfs")
"File systems that several nodes can see; anything else is taken for local."

_ESCAPE = re.compile(r"\\([0-7]{3})")
_FIELDS = re.compile(r"^(\s*)(\S+)(\s+)(\S+)(\s+)(\S+)(\s+)(\S+)(.*)$", re.DOTALL)


class Mount(NamedTuple):
    """One line of /proc/mounts."""

    source: str
    target: str
    kind: str
    options: tuple[str, ...]

    @property
    def network(self) -> bool:
        """Several nodes can see it."""
        return self.kind in NETWORK


class Volume(NamedTuple):
    """One line of /proc/fs/nfsfs/volumes."""

    version: str
    device: str
    "major:minor, as st_dev has it"
    fsc: bool


def unescape(text: str) -> str:
    r"""fstab's \040 is a blank."""
    return _ESCAPE.sub(lambda escape: chr(int(escape.group(1), 8)), text)


def parse_mounts(text: str) -> list[Mount]:
    """/proc/mounts, in its order: a later line covers an earlier one with the same target."""
    rows = [line.split() for line in text.splitlines()]
    return [Mount(unescape(row[0]), unescape(row[1]), row[2], tuple(row[3].split(","))) for row in rows if len(row) >= 4]


def current() -> list[Mount]:
    """What is mounted now."""
    return parse_mounts(Path("/proc/mounts").read_text())


def mount_of(path: str | Path) -> Mount | None:
    """The mount that holds a path."""
    real = os.path.realpath(path).rstrip("/") + "/"
    holding = [mount for mount in current() if real.startswith(mount.target.rstrip("/") + "/")]
    return max(reversed(holding), key=lambda mount: len(mount.target), default=None)


def parse_volumes(text: str) -> list[Volume]:
    """/proc/fs/nfsfs/volumes. Kernels before 5.x and after have the same columns; FSC is the last."""
    lines = text.splitlines()
    if not lines:
        return []
    names = lines[0].split()
    volumes = []
    for line in lines[1:]:
        row = dict(zip(names, line.split(), strict=False))
        if "DEV" in row:
            volumes.append(Volume(row.get("NV", ""), row["DEV"], row.get("FSC", "no") == "yes"))
    return volumes


class FstabLine:
    """One line, kept byte for byte. `target`, `kind` and `options` are empty where it is no entry."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.source = self.target = self.kind = ""
        self.options: tuple[str, ...] = ()
        self._parts: list[str] | None = None
        fields = _FIELDS.match(text)
        if fields and not fields.group(2).startswith("#"):
            self._parts = list(fields.groups())
            self.source, self.target = unescape(fields.group(2)), unescape(fields.group(4))
            self.kind, self.options = fields.group(6), tuple(fields.group(8).split(","))

    def with_option(self, option: str) -> FstabLine:
        """The same line with `option`; every other byte stays. Its negation (`nofsc`) gives way."""
        if self._parts is None or option in self.options or any(held.startswith(option + "=") for held in self.options):
            return self
        kept = [held for held in self.options if held != "no" + option]
        parts = list(self._parts)
        parts[7] = ",".join([*kept, option])
        return FstabLine("".join(parts))


def parse_fstab(text: str) -> list[FstabLine]:
    """Every line, comments and oddities too; `render_fstab` gives the same text back."""
    return [FstabLine(line) for line in text.splitlines(keepends=True)]


def render_fstab(lines: list[FstabLine]) -> str:
    """The text of the lines."""
    return "".join(line.text for line in lines)


def with_cache(text: str, target: str) -> str:
    """fstab with `fsc` on the NFS entry that is mounted at `target`; the same text where there is none or it has it."""
    return render_fstab(
        [
            line.with_option("fsc") if line.target.rstrip("/") == target.rstrip("/") and line.kind in NFS else line
            for line in parse_fstab(text)
        ]
    )


def space(path: str | Path) -> Json | None:
    """Bytes of the file system that holds `path`, all and free for this user."""
    try:
        status = os.statvfs(path)
    except OSError:
        return None
    return {"total": status.f_blocks * status.f_frsize, "free": status.f_bavail * status.f_frsize}


def existing(path: str | Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    place = Path(path)
    while not place.exists() and place != place.parent:
        place = place.parent
    return place
