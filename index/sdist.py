"""An sdist read as PEP 625 describes it: one top folder NAME-VERSION with PKG-INFO, nothing outside it."""

from __future__ import annotations

import tarfile
import zlib
from pathlib import Path

from index import metadata
from index.archive import MAX_MEMBERS, MAX_RATIO, MAX_UNPACKED, RATIO_FLOOR
from index.errors import RefusedError
from index.metadata import Metadata
from index.names import Distribution


def inspect(path: Path, distribution: Distribution) -> tuple[Metadata, bytes | None]:
    """Check the sdist at `path`; returns its metadata (and no record: only wheels carry one).

    Raises:
        RefusedError: what is wrong, in one sentence.
    """
    raw: bytes | None = None
    unpacked, bound = 0, max(RATIO_FLOOR, min(MAX_UNPACKED, path.stat().st_size * MAX_RATIO))
    try:
        with tarfile.open(path, "r|gz") as archive:
            for number, member in enumerate(archive):
                unpacked += member.size
                if number >= MAX_MEMBERS or unpacked > bound:
                    raise RefusedError(f"{distribution.filename} unpacks to too much", remedy="build it without the padding")
                _check_member(member, distribution)
                if member.name.rstrip("/") == f"{distribution.stem}/PKG-INFO":
                    raw = _read(archive, member, distribution)
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise RefusedError(
            f"{distribution.filename} is not a gzipped tar archive: {error}", remedy="build the sdist again"
        ) from error
    if raw is None:
        raise RefusedError(
            f"{distribution.filename} lacks {distribution.stem}/PKG-INFO", remedy="build it with a PEP 517 backend"
        )
    return metadata.read(raw, distribution), None


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo, distribution: Distribution) -> bytes:
    stream = archive.extractfile(member)
    if stream is None or member.size > metadata.MAX_METADATA:
        raise RefusedError(
            f"{distribution.filename}: PKG-INFO is not a plain file of a sane size", remedy="build the sdist again"
        )
    return stream.read()


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
        depth = 0
        for part in [*base, *member.linkname.split("/")]:
            depth += {"..": -1, ".": 0, "": 0}.get(part, 1)
            if depth < 1 and part == "..":
                raise RefusedError(
                    f"{distribution.filename}: {member.name} links out of its folder", remedy="build the sdist again"
                )
        if member.linkname.startswith("/"):
            raise RefusedError(
                f"{distribution.filename}: {member.name} links out of its folder", remedy="build the sdist again"
            )
