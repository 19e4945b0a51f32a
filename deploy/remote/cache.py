"""The NFS cache on a node: inspect, edit fstab, install cachefilesd, remount, verify, measure, undo. Requires `sudo -n`."""

from __future__ import annotations

import hashlib
import json
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
RECORD = Path("/etc/cachefilesd.gracefarm")
"What `install` changes on this node, as JSON, for `undo`. Written before the first change."
CACHED = Path("/var/cache/fscache")
"The files that cachefilesd keeps; its package does not remove them."


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
    absent = not shutil.which("cachefilesd", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if absent and not shutil.which("apt-get"):
        raise WorkerError(
            "node", "cachefilesd is not installed, and this node has no apt-get", "install cachefilesd on this node"
        )
    _record(absent)
    if absent:
        sudo("apt-get", "install", "-y", "--no-install-recommends", "cachefilesd")
    changed = _change_defaults("#RUN=yes", "RUN=yes") or absent  # switched off by default on Debian and Ubuntu
    if not running():
        sudo("systemctl", "enable", "--now", "cachefilesd")
        changed = True
    return {"changed": changed}


def _record(absent: bool) -> None:
    """Write RECORD, unless an earlier call has written it: its own changes are not the state before."""
    if RECORD.exists():
        return
    enabled = sudo("systemctl", "is-enabled", "--quiet", "cachefilesd", check=False).returncode == 0
    service = [] if running() else ["stop"] if enabled else ["disable", "--now"]
    off = DEFAULTS.exists() and "#RUN=yes" in map(str.strip, DEFAULTS.read_text().split("\n"))
    if not (absent or off or service):
        return
    with tempfile.NamedTemporaryFile("w") as stream:
        json.dump({"package": absent, "off": off, "service": service}, stream)
        stream.flush()
        sudo("cp", "--no-preserve=mode", stream.name, str(RECORD))


def _change_defaults(old: str, new: str) -> bool:
    """Replace a line of DEFAULTS. Return whether it was there."""
    text = DEFAULTS.read_text() if DEFAULTS.exists() else ""
    changed = "\n".join(new if line.strip() == old else line for line in text.split("\n"))
    if changed != text:
        _replace(DEFAULTS, changed.encode(), digest(text.encode()))
    return changed != text


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


def undo(request: Json) -> Json:
    """Undo what `install`, `write_fstab` and `remount` changed on this node. It can be repeated.

    Lines of /etc/fstab that were changed again since then stay, and also cachefilesd if it was installed before.

    Returns:
        What was changed back or removed.
    """
    del request
    backups = sorted(FSTAB.parent.glob(f"{FSTAB.name}.gracefarm-*"))
    undone: list[str] = []
    try:
        if backups:
            undone += _undo_fstab(backups)
        if RECORD.exists():
            undone += _undo_cachefilesd(json.loads(RECORD.read_text()))
        for path in (*backups, *([RECORD] if RECORD.exists() else [])):
            sudo("rm", str(path))
            undone.append(str(path))
    except WorkerError as error:
        raise WorkerError(
            error.kind, error.cause, "fix this error on the node, then repeat the command; or repeat it without --cache"
        ) from error
    return {"undone": undone}


def _undo_fstab(backups: list[Path]) -> list[str]:
    """Put the lines of the copies back into /etc/fstab, and mount their folders again."""
    before: dict[str, str] = {}
    for backup in backups:
        before |= mounts.lines_before(backup.read_bytes().decode(errors="surrogateescape"))
    content = FSTAB.read_bytes()
    lines = content.decode(errors="surrogateescape").splitlines(keepends=True)
    restored = [before.get(line, line) for line in lines]
    if restored != lines:
        _replace(FSTAB, "".join(restored).encode(errors="surrogateescape"), digest(content))
    for target in (mounts.target_of(line) for line in restored if line in before.values()):
        if fsc(target) is not True:
            continue
        process = sudo("umount", target, check=False)
        if process.returncode:
            raise WorkerError("busy", f"{target} still has its cache: {last_line(process.stderr)}", "")
        sudo("mount", target)
    return [f"the option fsc in {FSTAB}"] if restored != lines else []


def _undo_cachefilesd(record: Json) -> list[str]:
    """Change back what RECORD says."""
    if record["package"]:
        sudo("apt-get", "purge", "-y", "cachefilesd")
        sudo("rm", "-rf", str(CACHED))
        return ["the package cachefilesd", str(CACHED)]
    if record["service"]:
        sudo("systemctl", *record["service"], "cachefilesd")
    if record["off"]:
        _change_defaults("RUN=yes", "#RUN=yes")
    return [f"cachefilesd is switched off in {DEFAULTS}"] if record["off"] else ["cachefilesd is stopped"]


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


def running() -> bool:
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
