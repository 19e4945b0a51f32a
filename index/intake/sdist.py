"""An sdist read as PEP 625 describes it: one top folder NAME-VERSION with PKG-INFO, nothing outside it."""

from __future__ import annotations

import gzip
import tarfile
import zlib
from pathlib import Path
from typing import IO, cast

from gracefarm.files import CHUNK
from index.errors import RefusedError
from index.intake import metadata
from index.intake.archive import MAX_MEMBERS, MAX_RATIO, MAX_UNPACKED, RATIO_FLOOR
from index.intake.metadata import Metadata
from index.names import Distribution

MAX_HEADER = 1 << 20
"Bytes of one extended header, which tarfile reads whole; paths and dates take a few hundred."

_MAX_GLOBAL = 1000
"Keywords of global headers; git writes one."


class _Bounded:
    """The unpacked archive, of which nobody reads much at once, or past a bound."""

    def __init__(self, stream: gzip.GzipFile, bound: int, filename: str) -> None:
        self._stream, self._bound, self._filename = stream, bound, filename

    def read(self, size: int) -> bytes:
        if size > MAX_HEADER:
            raise RefusedError(f"{self._filename} has a header of {size} bytes", remedy="build the sdist again")
        self._check(self._stream.tell() + size)
        return self._stream.read(size)

    def seek(self, position: int) -> int:
        self._check(position)
        return self._stream.seek(position)

    def tell(self) -> int:
        return self._stream.tell()

    def _check(self, position: int) -> None:
        if position > self._bound:
            raise RefusedError(f"{self._filename} unpacks to too much", remedy="build it without the padding")


def inspect(path: Path, distribution: Distribution) -> tuple[Metadata, bytes | None]:
    """Check the sdist at `path`; returns its metadata (and no record: only wheels carry one).

    Raises:
        RefusedError: what is wrong, in one sentence.
    """
    bound = max(RATIO_FLOOR, min(MAX_UNPACKED, path.stat().st_size * MAX_RATIO))
    try:
        with gzip.open(path) as stream:
            bounded = cast("IO[bytes]", _Bounded(stream, bound, distribution.filename))
            with tarfile.open(fileobj=bounded, mode="r:") as archive:
                raw = _walk(archive, distribution)
    except (tarfile.TarError, EOFError, zlib.error, OSError, RecursionError, ValueError) as error:
        raise RefusedError(
            f"{distribution.filename} is not a gzipped tar archive: {error}", remedy="build the sdist again"
        ) from error
    if raw is None:
        raise RefusedError(
            f"{distribution.filename} lacks {distribution.stem}/PKG-INFO", remedy="build it with a PEP 517 backend"
        )
    return metadata.read(raw, distribution), None


def _walk(archive: tarfile.TarFile, distribution: Distribution) -> bytes | None:
    """Check every member; returns PKG-INFO."""
    raw: bytes | None = None
    count = 0
    while (member := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]  # tarfile keeps them for random access, which nobody wants
        count += 1
        if count > MAX_MEMBERS or len(archive.pax_headers) > _MAX_GLOBAL:
            raise RefusedError(f"{distribution.filename} unpacks to too much", remedy="build it without the padding")
        _check_member(member, distribution)
        if member.name.rstrip("/") == f"{distribution.stem}/PKG-INFO":
            raw = _read(archive, member, distribution)
    return raw


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo, distribution: Distribution) -> bytes:
    stream = archive.extractfile(member) if member.isreg() else None
    if stream is None or member.size > metadata.MAX_METADATA:
        raise RefusedError(
            f"{distribution.filename}: PKG-INFO is not a plain file of a sane size", remedy="build the sdist again"
        )
    content = bytearray()
    while chunk := stream.read(min(CHUNK, MAX_HEADER)):
        content += chunk
    return bytes(content)


def _check_member(member: tarfile.TarInfo, distribution: Distribution) -> None:
    parts = member.name.rstrip("/").split("/")
    if (
        member.name.startswith("/")
        or "\\" in member.name
        or "\0" in member.name
        or ".." in parts
        or parts[0] != distribution.stem
    ):
        raise RefusedError(
            f"{distribution.filename} holds {member.name!r}, outside its folder {distribution.stem}/",
            remedy="build the sdist again",
        )
    if not (member.isreg() or member.isdir() or member.issym() or member.islnk()):
        raise RefusedError(f"{distribution.filename}: {member.name} is a device or pipe", remedy="build the sdist again")
    if member.issym() or member.islnk():
        base = parts[:-1] if member.issym() else []
        depth, leaves = 0, member.linkname.startswith("/")
        for part in [*base, *member.linkname.split("/")]:
            depth += {"..": -1, ".": 0, "": 0}.get(part, 1)
            leaves = leaves or (depth < 1 and part == "..")
        if leaves:
            raise RefusedError(
                f"{distribution.filename}: {member.name} links out of its folder", remedy="build the sdist again"
            )
