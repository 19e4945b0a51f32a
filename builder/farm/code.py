"""Compare the gracefarm of two machines by a digest of its code, and pack the recipes that are sent with a cell."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterator
from importlib import resources
from importlib.metadata import version
from pathlib import Path

from builder.planning import matrix
from builder.planning.settings import PACKAGED, PARTS
from gracefarm.files import atomic_directory, lock


def digest() -> str:
    """Hex sha256 of the files of builder and gracefarm, without the recipes that a wheel carries."""
    result = hashlib.sha256()
    for package in ("builder", "gracefarm"):
        top = Path(str(resources.files(package)))
        for path in sorted(path for path in _files(top) if not path.is_relative_to(PACKAGED)):
            result.update(f"{package}/{path.relative_to(top)}\0".encode())
            result.update(hashlib.sha256(path.read_bytes()).digest())
    return result.hexdigest()


def title() -> str:
    """Version and digest, for people."""
    return f"{version('gracefarm')} ({digest()[:12]})"


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)


def pack(project: Path) -> bytes:
    """The recipes, stacks, interpreters and sets of a project as an archive; equal files give equal bytes."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        places = [path for part in PARTS for path in _files(project / part)]
        for path in sorted([*places, *(path for path in [project / matrix.FILE] if path.is_file())]):
            entry = tarfile.TarInfo(str(path.relative_to(project)))
            content = path.read_bytes()
            entry.size, entry.mode = len(content), 0o644
            archive.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


def unpack(archive: bytes, home: Path) -> Path:
    """The folder of a project that `pack` packed, the same for the same bytes."""
    name = hashlib.sha256(archive).hexdigest()
    folder = home / "farm" / "projects" / name
    with lock(home / "locks" / f"project-{name}"):
        if not folder.is_dir():
            with atomic_directory(folder) as partial, tarfile.open(fileobj=io.BytesIO(archive)) as files:
                files.extractall(partial, filter="data")
    return folder
