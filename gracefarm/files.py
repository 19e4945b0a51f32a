"""Files that are never half-written: atomic replacement, atomic creation of directories, locks, digests."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from gracefarm.errors import DiskFullError

CHUNK = 1 << 20


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync_directory(path: Path) -> None:
    """Flush renames and creations in the directory `path`, so that they survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush(path: Path) -> None:
    """Flush the file system of the directory `path`; fsync of a directory flushes only its names.

    Raises:
        OSError: a write failed.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(descriptor):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
    finally:
        os.close(descriptor)


@contextmanager
def full_disk(where: Path) -> Iterator[None]:
    """Turn ENOSPC and EDQUOT in the block into an error that names the file system.

    Raises:
        DiskFullError: replaces the OSError.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFullError(
            f"no space left on the file system that holds {where}",
            remedy="free space there (`builder clean` removes temporary files), or set GRACEFARM_HOME to a folder on a larger "
            "disk",
        ) from error


def atomic_write(path: Path, content: bytes | str) -> None:
    """Replace `path` by `content`, so that readers see either the old or the new bytes, even after a crash.

    Raises:
        DiskFullError: the file system is full; the old file is untouched.
    """
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    with full_disk(path.parent):
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        temporary = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    sync_directory(path.parent)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield an empty directory that is renamed to `path` if the block succeeds, and removed if it raises.

    The caller holds `lock` on the same name, so leftovers of a killed run are removed here. The file system is flushed before
    the rename, so that an existing directory is always complete.
    """
    partial = path.with_name(f".{path.name}.partial")
    remove_tree(partial)
    partial.mkdir(parents=True)
    try:
        with full_disk(path.parent):
            yield partial
            flush(partial)
            partial.rename(path)
    except BaseException:
        remove_tree(partial)
        raise
    sync_directory(path.parent)


@contextmanager
def lock(
    path: Path, on_wait: Callable[[], None] | None = None, *, keep_waiting: Callable[[], None] | None = None
) -> Iterator[None]:
    """Hold an exclusive lock on the file `path` (created, never removed).

    `on_wait` is called once if another process holds it. `keep_waiting` is called five times a second while waiting, and may
    raise to end the wait, since threads receive no signals.
    The kernel releases the lock when the process ends, so kill -9 leaves no stale lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if on_wait is not None:
                on_wait()
            _wait_for_lock(stream, keep_waiting)
        yield


def locked(path: Path) -> bool:
    """Whether a living process holds `lock` on the file."""
    try:
        with path.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _wait_for_lock(stream: IO[str], keep_waiting: Callable[[], None] | None) -> None:
    if keep_waiting is None:
        fcntl.flock(stream, fcntl.LOCK_EX)
        return
    while True:
        keep_waiting()
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.2)
        else:
            return


def disk_used(folder: Path) -> int:
    """Bytes that the files of a directory occupy on the disk; a file with several names counts once. 0: it does not exist."""
    seen: dict[tuple[int, int], int] = {}
    for parent, folders, names in os.walk(folder):
        for name in (*folders, *names):
            with suppress(FileNotFoundError):  # removed meanwhile
                status = os.lstat(os.path.join(parent, name))  # noqa: PTH118 tens of thousands of files
                seen[status.st_dev, status.st_ino] = status.st_blocks * 512
    return sum(seen.values())


def remove_tree(path: Path) -> None:
    """Remove a directory tree, including read-only directories. A missing tree is not an error."""
    if not path.is_symlink() and not path.exists():
        return
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return

    def make_writable(function: Callable[[str], object], name: str, _error: object) -> None:
        parent = Path(name).parent
        parent.chmod(parent.stat().st_mode | stat.S_IRWXU)
        if Path(name).is_dir() and not Path(name).is_symlink():
            Path(name).chmod(stat.S_IRWXU)
        function(name)

    shutil.rmtree(path, onerror=make_writable)
