"""The node's part of the NFS cache: look, edit fstab, install cachefilesd, mount again, verify, measure; needs `sudo -n`."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from deploy.remote import mounts
from deploy.remote.wire import Json, WorkerError
from gracefarm.process import last_line

FSTAB = Path("/etc/fstab")
DEFAULTS = Path("/etc/default/cachefilesd")


def inspect(request: Json) -> Json:
    """What holds `share`, what fstab says of it, whether its cache is on, and what is installed."""
    mount = mounts.mount_of(request["share"])
    if mount is None or not Path(request["share"]).is_dir():
        raise WorkerError("share", f"{request['share']} is no folder on this node", "mount the shared file system there")
    fstab = FSTAB.read_bytes().decode(errors="surrogateescape") if FSTAB.exists() else ""
    return {
        "target": mount.target,
        "kind": mount.kind,
        "source": mount.source,
        "fstab": fstab,
        "fsc": fsc(mount.target),
        "root": root() is not None,
    }


def fsc(target: str) -> bool | None:
    """FSC of the mount as the kernel says; None where there is no NFS."""
    volumes = Path("/proc/fs/nfsfs/volumes")
    if not volumes.exists():
        return None
    number = Path(target).stat().st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    return mounts.cached_volumes(volumes.read_text()).get(device)


def install(request: Json) -> Json:
    """cachefilesd from the node's own distribution, switched on; nothing where it runs already."""
    del request
    changed = False
    if not shutil.which("cachefilesd", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin"):
        if not shutil.which("apt-get"):
            raise WorkerError(
                "node", "cachefilesd is not installed, and this node has no apt-get", "install cachefilesd by hand"
            )
        sudo("apt-get", "install", "-y", "--no-install-recommends", "cachefilesd")
        changed = True
    if DEFAULTS.exists():  # Debian and Ubuntu ship it switched off
        old = DEFAULTS.read_text()
        new = "\n".join("RUN=yes" if line.strip() == "#RUN=yes" else line for line in old.split("\n"))
        if new != old:
            _replace(DEFAULTS, new.encode(), digest(old.encode()))
            changed = True
    if not _running():
        sudo("systemctl", "enable", "--now", "cachefilesd")
        changed = True
    return {"changed": changed}


def write_fstab(request: Json) -> Json:
    """Replace /etc/fstab by `text` if it is still what was read (`before`, sha256); the old one stays beside it."""
    new = request["text"].encode(errors="surrogateescape")
    old = FSTAB.read_bytes()
    if digest(old) != request["before"]:
        raise WorkerError("busy", "/etc/fstab changed while it was being edited", "repeat the command")
    backup = FSTAB.with_name(f"fstab.gracefarm-{digest(old)[:12]}")
    if not backup.exists():
        sudo("cp", "--preserve=all", str(FSTAB), str(backup))
    _replace(FSTAB, new, request["before"])
    return {"backup": str(backup)}


def _replace(path: Path, content: bytes, before: str) -> None:
    """Whole or not at all: a file beside it, flushed, then renamed over; owner and mode stay."""
    with tempfile.NamedTemporaryFile(delete=False) as stream:
        stream.write(content)
    beside = path.with_name(f".{path.name}.gracefarm")
    try:
        sudo("cp", "--preserve=all", str(path), str(beside))
        sudo("dd", "status=none", "conv=fsync", f"if={stream.name}", f"of={beside}")
        if digest(path.read_bytes()) != before:
            raise WorkerError("busy", f"{path} changed while it was being edited", "repeat the command")
        sudo("mv", "--no-target-directory", str(beside), str(path))
    finally:
        Path(stream.name).unlink()


def remount(request: Json) -> Json:
    """Make the option take effect: remount; where the kernel keeps the old one, unmount and mount. FSC afterwards."""
    target = request["target"]
    sudo("mount", "-o", "remount,fsc", target, check=False)
    if fsc(target) is not True:
        process = sudo("umount", target, check=False)
        if process.returncode:
            return {"fsc": fsc(target), "busy": process.stderr.strip() or f"{target} is in use"}
        sudo("mount", target)
    return {"fsc": fsc(target), "busy": None}


def measure(request: Json) -> Json:
    """Bytes per second of one sequential read of `bytes` of a file: cold, and from the cache on disk.

    Reads `path`, or the largest file below `share`. Cold and disk need the page cache dropped: root; else they are None.
    """
    path = Path(request["path"]) if request.get("path") else _largest(Path(request["share"]))
    if path is None:
        return {"path": None}
    size = min(path.stat().st_size, int(request["bytes"]))
    cold, warm = (_read(path, size) if drop_caches() else None for _ in range(2))
    return {"path": str(path), "bytes": size, "cold": cold, "warm": warm}


def _largest(share: Path) -> Path | None:
    best: tuple[int, Path] | None = None
    for folder, _, names in os.walk(share):
        for name in names:
            path = Path(folder) / name
            with suppress(OSError):
                status = path.lstat()
                if stat.S_ISREG(status.st_mode) and (best is None or status.st_size > best[0]):
                    best = (status.st_size, path)
        if best is not None and best[0] > 1 << 30:
            break
    return best[1] if best else None


def drop_caches() -> bool:
    """Whether the page cache was dropped."""
    os.sync()
    return sudo("sh", "-c", "echo 3 > /proc/sys/vm/drop_caches", check=False).returncode == 0 if root() is not None else False


def _read(path: Path, size: int) -> float:
    started, left = time.monotonic(), size
    with path.open("rb", buffering=0) as stream:
        while left > 0 and (block := stream.read(min(1 << 22, left))):
            left -= len(block)
    return size / max(time.monotonic() - started, 1e-6)


def _running() -> bool:
    for name in Path("/proc").glob("[0-9]*/comm"):
        with suppress(OSError):
            if name.read_text().strip() == "cachefilesd":
                return True
    return False


def root() -> list[str] | None:
    """How to run a command as root here, or None."""
    if os.geteuid() == 0:
        return []
    process = subprocess.run(["sudo", "-n", "true"], capture_output=True, check=False) if shutil.which("sudo") else None
    return ["sudo", "-n"] if process is not None and process.returncode == 0 else None


def sudo(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """A command as root. Raises WorkerError: that cannot be, or it failed and `check` is set."""
    prefix = root()
    if prefix is None:
        raise WorkerError("node", "this needs root, and sudo asks for a password", "allow sudo without one, or skip this step")
    process = subprocess.run([*prefix, *command], capture_output=True, text=True, check=False)
    if check and process.returncode:
        last = last_line(process.stderr)
        raise WorkerError("node", f"{' '.join(command)}: {last}", "do it by hand on this node, or skip this step")
    return process


def digest(content: bytes) -> str:
    """sha256."""
    return hashlib.sha256(content).hexdigest()
