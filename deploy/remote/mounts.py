"""/proc/mounts, /etc/fstab and /proc/fs/nfsfs/volumes as data (fstab(5), mount(8), fs/nfs/client.c)."""

from __future__ import annotations

import re
from typing import NamedTuple

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
    return _ESCAPE.sub(lambda found: chr(int(found.group(1), 8)), text)


def parse_mounts(text: str) -> list[Mount]:
    """/proc/mounts, in its order: a later line covers an earlier one with the same target."""
    rows = [line.split() for line in text.splitlines()]
    return [Mount(unescape(row[0]), unescape(row[1]), row[2], tuple(row[3].split(","))) for row in rows if len(row) >= 4]


def mount_of(path: str, mounts: list[Mount]) -> Mount | None:
    """The mount that holds `path` (absolute, symbolic links resolved)."""
    best = None
    for one in mounts:
        prefix = one.target.rstrip("/") + "/"
        if (path.rstrip("/") + "/").startswith(prefix) and (best is None or len(one.target) >= len(best.target)):
            best = one
    return best


def parse_volumes(text: str) -> list[Volume]:
    """/proc/fs/nfsfs/volumes. Kernels before 5.x and after have the same columns; FSC is the last."""
    lines = text.splitlines()
    if not lines:
        return []
    names = lines[0].split()
    found = []
    for line in lines[1:]:
        row = dict(zip(names, line.split(), strict=False))
        if "DEV" in row:
            found.append(Volume(row.get("NV", ""), row["DEV"], row.get("FSC", "no") == "yes"))
    return found


class FstabLine:
    """One line, kept byte for byte. `target`, `kind` and `options` are empty where it is no entry."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.source = self.target = self.kind = ""
        self.options: tuple[str, ...] = ()
        self._parts: list[str] | None = None
        found = _FIELDS.match(text)
        if found and not found.group(2).startswith("#"):
            self._parts = list(found.groups())
            self.source, self.target = unescape(found.group(2)), unescape(found.group(4))
            self.kind, self.options = found.group(6), tuple(found.group(8).split(","))

    def with_option(self, option: str) -> FstabLine:
        """The same line with `option`; every other byte stays. Its negation (`nofsc`) gives way."""
        if self._parts is None or option in self.options or any(one.startswith(option + "=") for one in self.options):
            return self
        kept = [one for one in self.options if one != "no" + option]
        parts = list(self._parts)
        parts[7] = ",".join([*kept, option])
        return FstabLine("".join(parts))


def parse_fstab(text: str) -> list[FstabLine]:
    """Every line, comments and oddities too; `render_fstab` gives the same text back."""
    return [FstabLine(line) for line in text.splitlines(keepends=True)]


def render_fstab(lines: list[FstabLine]) -> str:
    """The text of the lines."""
    return "".join(one.text for one in lines)


def with_cache(text: str, target: str) -> str:
    """fstab with `fsc` on the NFS entry that is mounted at `target`; the same text where there is none or it has it."""
    return render_fstab(
        [
            one.with_option("fsc") if one.target.rstrip("/") == target.rstrip("/") and one.kind in NFS else one
            for one in parse_fstab(text)
        ]
    )
