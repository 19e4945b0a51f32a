"""The NFS cache on a node: inspect, edit fstab, install cachefilesd, remount, verify, measure. Requires `sudo -n`."""

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
    """The mount of `share`, its entry in fstab, whether its cache is on, and whether root is possible."""
    mount = mounts.mount_of(request["share"])
    if mount is None or not Path(request["share"]).is_dir():
        raise WorkerError(
            "share", f"{request['share']} is not a folder on this node", "mount the shared file system at this path"
        )
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
    """Whether the kernel caches the mount (FSC); None if it is not NFS."""
    volumes = Path("/proc/fs/nfsfs/volumes")
    if not volumes.exists():
        return None
    number = Path(target).stat().st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    return mounts.cached_volumes(volumes.read_text()).get(device)


def install(request: Json) -> Json:
    """Install cachefilesd from the distribution and switch it on, unless it already runs."""
    del request
    changed = False
    if not shutil.which("cachefilesd", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin"):
        if not shutil.which("apt-get"):
            raise WorkerError(
                "node", "cachefilesd is not installed, and this node has no apt-get", "install cachefilesd on this node"
            )
        sudo("apt-get", "install", "-y", "--no-install-recommends", "cachefilesd")
        changed = True
    if DEFAULTS.exists():  # switched off by default on Debian and Ubuntu
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
    """Replace /etc/fstab by `text` if it still has the sha256 `before`. A copy of the old file is kept beside it."""
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
    """Replace a file atomically, keeping owner and mode: write a new file beside it, flush it, rename it."""
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
    """Apply the option: remount, or unmount and mount if the kernel ignores that. Return whether the kernel caches now."""
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

    Reads `path`, or the largest file below `share`. Both values are None without root, which can drop the page cache.
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
    """Drop the page cache. Return whether that was possible."""
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
    """The prefix to run a command as root, or None if it is not possible."""
    if os.geteuid() == 0:
        return []
    process = subprocess.run(["sudo", "-n", "true"], capture_output=True, check=False) if shutil.which("sudo") else None
    return ["sudo", "-n"] if process is not None and process.returncode == 0 else None


def sudo(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command as root. Raises WorkerError if that is not possible, or if it fails and `check` is true."""
    prefix = root()
    if prefix is None:
        raise WorkerError(
            "node",
            "this requires root, but sudo asks for a password",
            "allow sudo without a password, or skip this step: `deploy up --skip cache`",
        )
    process = subprocess.run([*prefix, *command], capture_output=True, text=True, check=False)
    if check and process.returncode:
        last = last_line(process.stderr)
        raise WorkerError(
            "node",
            f"{' '.join(command)}: {last}",
            "fix this error on the node, then repeat `deploy up`; or skip this step: `deploy up --skip cache`",
        )
    return process


def digest(content: bytes) -> str:
    """sha256."""
    return hashlib.sha256(content).hexdigest()
