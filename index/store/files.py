"""Content-addressed files: ROOT/files/ab/abcdef…. A file that has a name there is complete, flushed and never changes.

A file is written under ROOT/staging (same file system), flushed, then linked to its name. The next start removes the staging
files of a killed process.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from gracefarm.errors import HostError
from gracefarm.files import sha256_file, sync_directory
from index.errors import StoreFullError

_ABANDONED = 24 * 3600
"Seconds without a write after which a staging file counts as abandoned."


@dataclass(frozen=True, kw_only=True)
class Store:
    """The folder of an index."""

    root: Path

    @property
    def catalogue_path(self) -> Path:
        """The SQLite file. It has a separate folder, so that a backup can copy it before the files."""
        return self.root / "catalogue" / "catalogue.db"

    @property
    def files(self) -> Path:
        """Content-addressed files."""
        return self.root / "files"

    @property
    def staging(self) -> Path:
        """Folder of files that are still being received."""
        return self.root / "staging"

    def path(self, sha256: str) -> Path:
        """The path of the file with that digest, whether it exists or not."""
        return self.files / sha256[:2] / sha256

    def prepare(self) -> None:
        """Create the folders.

        Raises:
            StoreFullError: the disk is full.
            HostError: the folder cannot be created: a file has its name, or the file system refuses.
        """
        try:
            with disk_errors(self.root):
                self._make_folders()
        except OSError as error:
            raise HostError(
                f"cannot create {self.root}, the folder of the index: {error.strerror}",
                remedy="choose another folder with --root or GRACEFARM_INDEX_ROOT",
            ) from error

    def _make_folders(self) -> None:
        for folder in (self.files, self.staging, self.catalogue_path.parent):
            folder.mkdir(parents=True, exist_ok=True)
        if not (self.files / "ff").is_dir():  # created in advance, so that an upload does not have to flush a new folder
            for number in range(256):
                (self.files / f"{number:02x}").mkdir(exist_ok=True)
            sync_directory(self.files)

    def new_staging(self) -> Path:
        """A new name in the staging folder."""
        return self.staging / secrets.token_hex(16)

    @contextmanager
    def staged(self) -> Iterator[Path]:
        """A new name in the staging folder; the file is removed at the end of the block unless it was adopted."""
        path = self.new_staging()
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def adopt(self, staged: Path, sha256: str) -> Path:
        """Link a flushed staging file to its name; the caller has computed `sha256` from its bytes.

        The staging name remains until the caller removes it: a second upload of the same bytes may be in progress.
        """
        final = self.path(sha256)
        with disk_errors(self.root):
            if not final.parent.is_dir():
                final.parent.mkdir(parents=True, exist_ok=True)
                sync_directory(final.parent.parent)
            if not final.exists() or final.stat().st_size != staged.stat().st_size:
                staged.chmod(0o444)
                staged.replace(final)
            # Also for an existing file: the process that linked it may have been killed before it flushed the name.
            sync_directory(final.parent)
        return final

    def add_bytes(self, content: bytes, sha256: str) -> Path:
        """Store small content (metadata, records) under its digest.

        Raises:
            StoreFullError: the disk is full.
        """
        final = self.path(sha256)
        if final.exists() and final.stat().st_size == len(content):
            return final
        with self.staged() as staged:
            with disk_errors(self.root), staged.open("wb") as stream:
                stream.write(content)
                flush(stream)
            return self.adopt(staged, sha256)

    def stored(self) -> list[Path]:
        """Every content-addressed file."""
        return sorted(self.files.glob("??/*"))

    def sizes(self) -> dict[str, int]:
        """Digest to size in bytes of every stored file: the quick check at the start."""
        sizes: dict[str, int] = {}
        for folder in os.scandir(self.files):
            if folder.is_dir():
                sizes.update((entry.name, entry.stat().st_size) for entry in os.scandir(folder.path))
        return sizes

    def sweep(self) -> int:
        """Remove the files of killed uploads; return their number. Only the server, which holds `serving`, calls this.

        While a command uses the staging folder (`using_staging`), only abandoned files are removed.
        """
        count = 0
        with (self.root / "staging.lock").open("a") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                oldest = float("inf")
            except BlockingIOError:
                oldest = time.time() - _ABANDONED
            for left in self.staging.iterdir():
                with suppress(FileNotFoundError):
                    if left.stat().st_mtime < oldest:
                        left.unlink()
                        count += 1
        return count

    @contextmanager
    def using_staging(self) -> Iterator[None]:
        """Protect the staging files of a command (import, mirror) from being removed by a server that starts."""
        self.prepare()
        with (self.root / "staging.lock").open("a") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH)
            yield

    def whole(self, sha256: str) -> bool:
        """Whether the stored file still has its digest."""
        path = self.path(sha256)
        return path.is_file() and sha256_file(path) == sha256

    def set_aside(self, sha256: str) -> None:
        """Move a damaged file from the store to ROOT/damaged, where the operator can examine it."""
        path = self.path(sha256)
        if path.exists():
            (self.root / "damaged").mkdir(exist_ok=True)
            path.replace(self.root / "damaged" / sha256)
            sync_directory(path.parent)

    @contextmanager
    def serving(self) -> Iterator[bool]:
        """Hold the lock of the server of this root; yields False if another process holds it."""
        self.prepare()
        with (self.root / "serving.lock").open("a") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True


def flush(stream: IO[bytes]) -> None:
    """Flush a file to the disk."""
    stream.flush()
    os.fsync(stream.fileno())


@contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn ENOSPC and EDQUOT into a refusal that clients can read.

    Raises:
        StoreFullError: replaces the OSError.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StoreFullError(
            f"no space left on the file system that holds {where.name}",
            remedy="free space on the disk of the index, then upload again",
        ) from error
