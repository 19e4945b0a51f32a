"""Strict checks of a zip archive: framing, names, sizes. An archive that two readers could read differently is refused."""

from __future__ import annotations

import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from index.errors import RefusedError

MAX_MEMBERS = 100_000
MAX_UNPACKED = 16 << 30
"Maximum unpacked bytes: several times the largest known CUDA wheel."
MAX_RATIO = 200
"Maximum compression ratio. Text reaches 20 and cubins 10; zip bombs start at 1000."
MAX_DIRECTORY = 64 << 20
"Maximum bytes of the central directory. zipfile reads all of it and creates an object per entry before we can count them."
RATIO_FLOOR = 64 << 20
"Unpacked bytes below which the ratio is ignored: an empty cubin section has no limit on its ratio."

_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_END_OF_DIRECTORY = 22
_ZIP64_LOCATOR = struct.Struct("<4sLQL")
_ZIP64_END = struct.Struct("<4sQ2H2L4Q")
_ENTRY = 46
"Fixed bytes of a directory entry. Name, extra field and comment follow; their lengths are at offset 28."
_SPLIT = "split the distribution into several smaller distributions"
_KNOWN_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


@contextmanager
def open_zip(path: Path, filename: str) -> Iterator[zipfile.ZipFile]:
    """Open and check the archive at `path`. Errors call it `filename`.

    Raises:
        RefusedError: it is not a zip, readers could disagree on its content, a path leaves the tree, or it is a zip bomb.
    """
    try:
        _check_directory(filename, path)
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            _check_sizes(filename, members, path.stat().st_size)
            _check_names(filename, members)
            _check_framing(filename, archive, path)
            yield archive
    except (zipfile.BadZipFile, EOFError, zlib.error, struct.error, NotImplementedError, UnicodeDecodeError) as error:
        raise RefusedError(
            f"{filename} is not a zip archive: {error}",
            remedy="build or fetch the file again; it is truncated or has a different format",
        ) from error


def _check_directory(filename: str, path: Path) -> None:
    """Count the entries in the directory's bytes, before zipfile creates objects for them."""
    with path.open("rb") as stream:
        start, size = _directory(filename, stream, path.stat().st_size)
        if size > MAX_DIRECTORY:
            raise RefusedError(
                f"the central directory of {filename} has {size} bytes, more than {MAX_DIRECTORY}",
                remedy=_SPLIT,
            )
        stream.seek(max(0, start))
        directory = stream.read(size)
    count = position = 0
    while position + _ENTRY <= len(directory):
        position += _ENTRY + sum(struct.unpack_from("<3H", directory, position + 28))
        count += 1
    if count > MAX_MEMBERS:
        raise RefusedError(f"{filename} contains {count} files, more than {MAX_MEMBERS}", remedy=_SPLIT)


def _directory(filename: str, stream: IO[bytes], length: int) -> tuple[int, int]:
    """Offset and size of the central directory as zipfile will find it: it ends where the end records begin."""
    at = length - _END_OF_DIRECTORY
    stream.seek(max(0, at))
    end = stream.read(_END_OF_DIRECTORY)
    if at < 0 or end[:4] != b"PK\x05\x06" or end[-2:] != b"\0\0":
        stream.seek(max(0, at - 0xFFFF))
        if b"PK\x05\x06" not in stream.read():
            raise RefusedError(f"{filename} is not a zip archive", remedy="build or fetch the file again")
        raise RefusedError(
            f"{filename}: there are bytes after the end of the archive", remedy="create the archive again, without a comment"
        )
    size = int.from_bytes(end[12:16], "little")
    if at >= _ZIP64_LOCATOR.size + _ZIP64_END.size:
        stream.seek(at - _ZIP64_LOCATOR.size - _ZIP64_END.size)
        record, locator = stream.read(_ZIP64_END.size), stream.read(4)
        if locator == b"PK\x06\x07" and record[:4] == b"PK\x06\x06":
            size = _ZIP64_END.unpack(record)[8]
            at -= _ZIP64_LOCATOR.size + _ZIP64_END.size
    return at - size, size


def _check_sizes(filename: str, members: list[zipfile.ZipInfo], packed: int) -> None:
    if len(members) > MAX_MEMBERS:
        raise RefusedError(f"{filename} contains {len(members)} files, more than {MAX_MEMBERS}", remedy=_SPLIT)
    unpacked = sum(member.file_size for member in members)
    if unpacked > MAX_UNPACKED or (unpacked > RATIO_FLOOR and unpacked > packed * MAX_RATIO):
        raise RefusedError(
            f"{filename} unpacks from {packed} to {unpacked} bytes: a zip bomb",
            remedy="remove the files that compress to almost nothing, then build the distribution again",
        )


def _check_names(filename: str, members: list[zipfile.ZipInfo]) -> None:
    seen: set[str] = set()
    for member in members:
        name = member.orig_filename
        parts = name.rstrip("/").split("/")
        if (
            name.startswith("/")
            or "\\" in name
            or "\0" in name
            or any(part in ("", ".", "..") for part in parts)
            or ":" in parts[0]
        ):
            raise RefusedError(
                f"{filename} contains {name!r}, which is not a plain relative path",
                remedy="build the distribution again with relative paths, without '.', '..', ':' and backslashes",
            )
        folded = unicodedata.normalize("NFC", name)
        if folded in seen:
            raise RefusedError(
                f"{filename} contains {name!r} twice",
                remedy="build the distribution again with only one of these files, since installers would not "
                "all choose the same one",
            )
        seen.add(folded)
        if member.flag_bits & 0x1:
            raise RefusedError(f"{filename}: {name} is encrypted", remedy="create the archive again, without encryption")
        if member.compress_type not in _KNOWN_METHODS:
            raise RefusedError(
                f"{filename}: {name} uses compression method {member.compress_type}",
                remedy="create the archive again with deflate or store (PEP 427)",
            )
        if (member.external_attr >> 28) == 0xA:
            raise RefusedError(
                f"{filename}: {name} is a symbolic link", remedy="replace the link with the file, and create the archive again"
            )


def _check_framing(filename: str, archive: zipfile.ZipFile, path: Path) -> None:
    """Members, central directory and end record must cover the file without gaps or overlaps.

    A streaming reader uses the local headers, a seeking reader the directory: with gaps or overlaps they unpack different
    files.
    """
    start = archive.start_dir
    with path.open("rb") as stream:
        position = 0
        for member in sorted(archive.infolist(), key=lambda item: item.header_offset):
            if member.header_offset != position:
                raise RefusedError(
                    f"{filename} has bytes before {member.filename} that belong to no file", remedy="create the archive again"
                )
            position = _end_of_member(filename, stream, member)
        if position != start:
            raise RefusedError(
                f"{filename} has bytes before the central directory that belong to no file", remedy="create the archive again"
            )


def _end_of_member(filename: str, stream: IO[bytes], member: zipfile.ZipInfo) -> int:
    stream.seek(member.header_offset)
    header = _LOCAL_HEADER.unpack(stream.read(_LOCAL_HEADER.size))
    flags, name_length, extra_length = header[2], header[9], header[10]
    name = stream.read(name_length)
    if header[0] != b"PK\x03\x04" or name.decode("utf-8" if flags & 0x800 else "cp437") != member.orig_filename:
        raise RefusedError(
            f"{filename}: the local header of {member.filename} names a different file", remedy="create the archive again"
        )
    end: int = member.header_offset + _LOCAL_HEADER.size + name_length + extra_length + member.compress_size
    if not flags & 0x8:
        if 0xFFFFFFFF not in header[7:9] and (header[7], header[8]) != (member.compress_size, member.file_size):
            raise RefusedError(
                f"{filename}: the local header and the central directory give different sizes of {member.filename}",
                remedy="create the archive again",
            )
        return end
    return end + _descriptor_length(stream, end, member)


def _descriptor_length(stream: IO[bytes], end: int, member: zipfile.ZipInfo) -> int:
    """Length of a data descriptor: with or without signature, 32 or 64 bits."""
    stream.seek(end)
    raw = stream.read(24)
    for layout in ("<4sLLL", "<4sLQQ", "<LLL", "<LQQ"):
        size = struct.calcsize(layout)
        values = struct.unpack(layout, raw[:size]) if len(raw) >= size else ()
        if values[-3:] == (member.CRC, member.compress_size, member.file_size) and (
            len(values) == 3 or values[0] == b"PK\x07\x08"
        ):
            return size
    raise RefusedError(
        f"the data descriptor of {member.filename} differs from the central directory",
        remedy="create the archive again",
    )
