"""Checks of an sdist (PEP 625): one top folder NAME-VERSION with PKG-INFO, and nothing outside it."""

from __future__ import annotations

import gzip
import tarfile
import zlib
from pathlib import Path
from typing import IO, cast

from packaging.utils import canonicalize_name

from gracefarm.files import CHUNK
from index.errors import RefusedError
from index.intake import metadata
from index.intake.archive import MAX_MEMBERS, MAX_RATIO, MAX_UNPACKED, RATIO_FLOOR, open_zip
from index.intake.defects import Defects
from index.intake.metadata import HasFile, Metadata
from index.names import Distribution, same_version

MAX_HEADER = 1 << 20
"Maximum bytes of an extended header, which tarfile reads whole. Paths and dates take a few hundred."

_MAX_GLOBAL = 1000
"Maximum keywords of global headers; git writes one."
_AGAIN = "build the sdist again with a PEP 517 backend"


class _Bounded:
    """The unpacked archive, with limits on one read and on the total."""

    def __init__(self, stream: gzip.GzipFile, bound: int, filename: str) -> None:
        self._stream, self._bound, self._filename = stream, bound, filename

    def read(self, size: int) -> bytes:
        if size > MAX_HEADER:
            raise RefusedError(
                f"{self._filename} contains a tar header of {size} bytes, more than {MAX_HEADER}",
                remedy=_AGAIN,
            )
        self._check(self._stream.tell() + size)
        return self._stream.read(size)

    def seek(self, position: int) -> int:
        self._check(position)
        return self._stream.seek(position)

    def tell(self) -> int:
        return self._stream.tell()

    def _check(self, position: int) -> None:
        if position > self._bound:
            raise RefusedError(
                f"{self._filename} unpacks to more than {self._bound} bytes",
                remedy="remove the files that compress to almost nothing, then build the sdist again",
            )


def inspect(path: Path, defects: Defects) -> tuple[Metadata, None, None]:
    """Check the sdist at `path`; return its metadata, without record and variant, which only wheels contain.

    Raises:
        RefusedError: the sdist is invalid.
    """
    read = _inspect_zip if defects.distribution.filename.endswith(".zip") else _inspect_tar
    return read(path, defects), None, None


def _inspect_zip(path: Path, defects: Defects) -> Metadata:
    """Sdists older than PEP 625 may be zip archives. pip and uv install them."""
    distribution = defects.distribution
    with open_zip(path, distribution.filename) as archive:
        names = archive.namelist()
        top = _own_folder(names[0], distribution) if names else distribution.stem
        for name in names:
            if name.partition("/")[0] != top:
                raise _outside(name, top, distribution)
        member = archive.NameToInfo.get(f"{top}/PKG-INFO")
        if member is None or member.file_size > metadata.MAX_METADATA:
            raise RefusedError(
                f"{distribution.filename} lacks {top}/PKG-INFO, or this file is too large",
                remedy=_AGAIN,
            )
        _check_project(defects, lambda name: f"{top}/{name}" in archive.NameToInfo)
        return metadata.read(archive.read(member), defects, lambda name: f"{top}/{name}" in archive.NameToInfo)


def _inspect_tar(path: Path, defects: Defects) -> Metadata:
    distribution = defects.distribution
    names: set[int] = set()
    bound = max(RATIO_FLOOR, min(MAX_UNPACKED, path.stat().st_size * MAX_RATIO))
    try:
        with gzip.open(path) as stream:
            bounded = cast("IO[bytes]", _Bounded(stream, bound, distribution.filename))
            with tarfile.open(fileobj=bounded, mode="r:", tarinfo=_Member) as archive:
                raw = _walk(archive, distribution, names)
    except _SparseError:
        raise RefusedError(
            f"{distribution.filename} contains a sparse file, which tools unpack in different ways",
            remedy="build the sdist again with a PEP 517 backend; if you use tar, omit --sparse",
        ) from None
    except (tarfile.TarError, EOFError, zlib.error, OSError, RecursionError, ValueError) as error:
        raise RefusedError(f"{distribution.filename} is not a gzipped tar archive: {error}", remedy=_AGAIN) from error
    if raw is None:
        raise RefusedError(f"{distribution.filename} lacks {distribution.stem}/PKG-INFO", remedy=_AGAIN)
    _check_project(defects, lambda name: hash(name) in names)
    return metadata.read(raw, defects, lambda name: hash(name) in names)


def _check_project(defects: Defects, has_file: HasFile) -> None:
    """pip and uv select an sdist before they look for the file that builds it."""
    if not has_file("pyproject.toml") and not has_file("setup.py"):
        defects.refuse("it contains neither pyproject.toml nor setup.py", remedy=_AGAIN)


class _SparseError(tarfile.TarError):
    """A member of the archive is a sparse file."""


class _Member(tarfile.TarInfo):
    """Stop reading at a sparse member: tarfile would read a map of unlimited length next."""

    def _refuse(self, *_arguments: object) -> tarfile.TarInfo:
        raise _SparseError

    _proc_sparse = _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse


def _walk(archive: tarfile.TarFile, distribution: Distribution, names: set[int]) -> bytes | None:
    """Check every member; return PKG-INFO, and collect in `names` the hashes of the members' paths below the top folder."""
    raw: bytes | None = None
    count = 0
    top = "" if distribution.published else distribution.stem
    while (member := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]  # tarfile keeps them for random access, which is not needed
        count += 1
        if count > MAX_MEMBERS or len(archive.pax_headers) > _MAX_GLOBAL:
            raise RefusedError(
                f"{distribution.filename} contains more than {MAX_MEMBERS} files, or too many global tar headers",
                remedy="build the sdist again with fewer files",
            )
        if any(key.startswith("GNU.sparse.") for key in member.pax_headers):
            raise _SparseError
        top = top or _own_folder(member.name, distribution)
        _check_member(member, top, distribution)
        if member.isreg():
            names.add(hash(member.name.partition("/")[2]))  # hashes, since there may be many long names
        if member.name.rstrip("/") == f"{top}/PKG-INFO":
            raw = _read(archive, member, distribution)
    return raw


def _own_folder(path: str, distribution: Distribution) -> str:
    """The top folder of an sdist published elsewhere: NAME-VERSION in any spelling, since older backends differ."""
    folder = path.partition("/")[0]
    name, _, version = folder.rpartition("-")
    own = canonicalize_name(name) == distribution.project and same_version(version, distribution.version)
    return folder if own else distribution.stem


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo, distribution: Distribution) -> bytes:
    stream = archive.extractfile(member) if member.isreg() else None
    if stream is None or member.size > metadata.MAX_METADATA:
        raise RefusedError(f"{distribution.filename}: PKG-INFO is not a regular file, or is too large", remedy=_AGAIN)
    content = bytearray()
    while chunk := stream.read(min(CHUNK, MAX_HEADER)):
        content += chunk
    return bytes(content)


def _outside(name: str, top: str, distribution: Distribution) -> RefusedError:
    return RefusedError(f"{distribution.filename} contains {name!r}, outside its folder {top}/", remedy=_AGAIN)


def _check_member(member: tarfile.TarInfo, top: str, distribution: Distribution) -> None:
    parts = member.name.rstrip("/").split("/")
    if member.name.startswith("/") or "\\" in member.name or "\0" in member.name or ".." in parts or parts[0] != top:
        raise _outside(member.name, top, distribution)
    if not (member.isreg() or member.isdir() or member.issym() or member.islnk()):
        raise RefusedError(
            f"{distribution.filename}: {member.name} is a device or pipe", remedy="remove it, and build the sdist again"
        )
    if member.issym() or member.islnk():
        base = parts[:-1] if member.issym() else []
        depth, leaves = 0, member.linkname.startswith("/")
        for part in [*base, *member.linkname.split("/")]:
            depth += {"..": -1, ".": 0, "": 0}.get(part, 1)
            leaves = leaves or (depth < 1 and part == "..")
        if leaves:
            raise RefusedError(
                f"{distribution.filename}: {member.name} is a link to a file outside of its folder",
                remedy="replace the link with the file, and build the sdist again",
            )
