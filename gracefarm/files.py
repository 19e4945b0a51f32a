"""Files that are never half-written: atomic replacement, directories that appear whole, locks, digests."""

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
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from gracefarm.errors import DiskFullError

CHUNK = 1 << 20


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync_directory(path: Path) -> None:
    """Make renames and creations in `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush(path: Path) -> None:
    """Write all that is pending for the file system of the directory `path`; fsync of a directory writes its names alone.

    Raises:
        OSError: the disk refused some of it.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(descriptor):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
    finally:
        os.close(descriptor)


@contextmanager
def full_disk(where: Path) -> Iterator[None]:
    """Turn ENOSPC and EDQUOT below into a sentence that names the file system.

    Raises:
        DiskFullError: instead of the bare OSError.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFullError(
            f"no space left on the file system that holds {where}",
            remedy="free space there (`builder clean` removes what can be made again) or set GRACEFARM_HOME to a larger disk",
        ) from error


def atomic_write(path: Path, content: bytes | str) -> None:
    """Replace `path` by `content` so that a reader sees the old bytes or the new, also after a crash.

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
    """Yield an empty directory that becomes `path` when the block ends well and vanishes when it does not.

    The caller holds `lock` on the same name, so a left-over of a killed run is swept here. The file system is
    flushed before the rename, so that a directory that is there is whole.
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

    `on_wait` is called once when somebody else holds it. `keep_waiting` is called five times a second while waiting and
    may raise: a thread gets no signal that would end its wait.
    The kernel drops the lock with the process, so kill -9 leaves nothing to clean.
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


def remove_tree(path: Path) -> None:
    """Remove a directory tree, read-only directories in it included; absent is fine."""
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
