"""Unpack untrusted archives (tar, zip, Debian packages): no path outside of the tree, no write through a link, no device.

Debian 12 has Python 3.11.2, whose tarfile lacks filters (PEP 706), and zipfile has no filters: both use the one writer here.
"""

from __future__ import annotations

import calendar
import gzip
import lzma
import os
import shutil
import stat
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from tempfile import TemporaryFile
from typing import IO

from gracefarm.errors import HostError, SourceError
from gracefarm.process import die_with_us, last_line

BROKEN = (
    tarfile.TarError,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    gzip.BadGzipFile,
    zipfile.BadZipFile,
    NotImplementedError,
    RuntimeError,
)
"What the readers raise on a damaged, encrypted or unsupported archive."
DEB_MAGIC = b"!<arch>\ndebian-binary"
"How a Debian package begins (deb(5))."
EARLIEST = 315532800
"1980-01-01, the earliest time that a zip file, and so a wheel, can hold."
LATEST = 4354819198
"2107-12-31, the latest one."
_SET_ID = stat.S_ISUID | stat.S_ISGID


@dataclass(frozen=True, kw_only=True)
class Member:
    """One entry of an archive, with the path that the archive gives it."""

    path: PurePosixPath
    mode: int
    "st_mode of a file, a folder or a symbolic link."
    mtime: int
    target: str
    "Target of a symbolic link."
    open: Callable[[], IO[bytes]]


def extract(archive: Path, into: Path, name: str, *, strip: bool) -> None:
    """Unpack into the folder `into`; `strip` removes the top folder if there is exactly one.

    Raises:
        SourceError: the file is not an archive; or a member leaves the tree, goes through a link, overwrites an existing file,
            or is a device, a pipe or set-user-id. `name` is the archive's name in the message.
    """
    with _members(archive, name) as members:
        written: set[Path] = set()
        for member in _stripped(members) if strip else members:
            _write(member, into, written, name)
    _check_links(into, written, name)


def extract_members(archive: Path, into: Path, name: str, places: Mapping[str, str | tuple[str, ...]]) -> None:
    """Unpack single files and folders of an archive, each to one or more paths below `into`.

    Raises:
        SourceError: as in `extract`, or the archive has no such member.
    """
    with _members(archive, name) as members:
        written: set[Path] = set()
        for wanted, targets in sorted(places.items()):
            start = PurePosixPath(wanted)
            chosen = [member for member in members if member.path == start or start in member.path.parents]
            if not any(not stat.S_ISDIR(member.mode) for member in chosen):
                raise SourceError(
                    f"{name}: the archive has no {wanted!r}", remedy="correct `members` of [[files]] in the recipe"
                )
            for place in (targets,) if isinstance(targets, str) else targets:
                for member in chosen:
                    _write(replace(member, path=PurePosixPath(place) / member.path.relative_to(start)), into, written, name)
    _check_links(into, written, name)


def newest_mtime(archive: Path, name: str) -> int:
    """The latest modification time in the archive, in seconds since 1970, limited to what a wheel can hold.

    Raises:
        SourceError: the file is not an archive.
    """
    with _members(archive, name) as members:
        return clamp(max((member.mtime for member in members), default=EARLIEST))


def clamp(moment: int) -> int:
    """The nearest time that a zip can hold."""
    return min(max(moment, EARLIEST), LATEST)


@contextmanager
def _members(archive: Path, name: str) -> Iterator[list[Member]]:
    """The members, readable inside the `with` block. Files of the store have no suffix, so the content decides the format."""
    try:
        if _is_deb(archive):
            with _tar_of_deb(archive, name) as stream, tarfile.open(fileobj=stream) as tar:
                yield [_of_tar(tar, info, name) for info in tar.getmembers()]
        elif tarfile.is_tarfile(archive):
            with tarfile.open(archive) as tar:
                yield [_of_tar(tar, info, name) for info in tar.getmembers()]
        elif zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                yield [_of_zip(opened, info, name) for info in opened.infolist()]
        else:
            kinds = ".tar.gz, .tar.xz, .tar.bz2, .zip, .whl or .deb"
            raise SourceError(f"{name} is not a tar archive, a zip archive or a Debian package", remedy=f"pin a {kinds}")
    except BROKEN as error:
        raise SourceError(
            f"{name} cannot be unpacked: {error}", remedy="pin a complete archive, since this archive is damaged"
        ) from error


def _is_deb(archive: Path) -> bool:
    with archive.open("rb") as stream:
        return stream.read(len(DEB_MAGIC)) == DEB_MAGIC


@contextmanager
def _tar_of_deb(archive: Path, name: str) -> Iterator[IO[bytes]]:
    """The package's files as a tar archive, read with dpkg-deb into a temporary file beside the store's file.

    Raises:
        SourceError: dpkg-deb cannot read the package.
        HostError: dpkg-deb is missing.
    """
    if shutil.which("dpkg-deb") is None:
        raise HostError("dpkg-deb is not installed", remedy="install the package dpkg, then run the command again")
    with TemporaryFile(dir=archive.parent) as stream:
        command = die_with_us(["dpkg-deb", "--fsys-tarfile", str(archive)])
        process = subprocess.run(command, stdout=stream, stderr=subprocess.PIPE, check=False)
        if process.returncode:
            reason = last_line(process.stderr.decode(errors="replace"))
            raise SourceError(
                f"{name} cannot be unpacked: {reason}", remedy="pin a complete package, since this package is damaged"
            )
        stream.seek(0)
        yield stream


def _of_tar(tar: tarfile.TarFile, info: tarfile.TarInfo, name: str) -> Member:
    kind = stat.S_IFLNK if info.issym() else stat.S_IFDIR if info.isdir() else stat.S_IFREG
    if not (info.isreg() or info.islnk() or info.issym() or info.isdir()):
        raise _refused(name, info.name, "is a device or a pipe")
    if info.isdir() and info.mode & _SET_ID:
        raise _refused(name, info.name, "is set-user-id or set-group-id")

    def content() -> IO[bytes]:
        try:
            stream = tar.extractfile(info)
        except KeyError:
            stream = None
        if stream is None:
            raise _refused(name, info.name, f"is a link to {info.linkname!r}, which is not a file of the archive")
        return stream

    return _member(info.name, kind | stat.S_IMODE(info.mode), int(info.mtime), info.linkname, content, name)


def _of_zip(opened: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> Member:
    mode = info.external_attr >> 16
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK):
        raise _refused(name, info.filename, "is a device or a pipe")
    link = stat.S_ISLNK(mode)
    kind = stat.S_IFLNK if link else stat.S_IFDIR if info.is_dir() else stat.S_IFREG
    target = os.fsdecode(opened.read(info)) if link else ""
    return _member(info.filename, kind | stat.S_IMODE(mode), _seconds(info), target, lambda: opened.open(info), name)


def _seconds(info: zipfile.ZipInfo) -> int:
    # A zip has local times without a time zone. UTC gives the same result on every machine. Some archives have month 0.
    year, month, *rest = info.date_time
    return calendar.timegm((year, min(max(month, 1), 12), *rest))


def _member(path: str, mode: int, mtime: int, target: str, content: Callable[[], IO[bytes]], name: str) -> Member:
    place = PurePosixPath(path)
    if place.is_absolute() or ".." in place.parts or "\0" in path:
        raise _refused(name, path, "leads out of the source tree")
    if mode & _SET_ID and not stat.S_ISDIR(mode):
        raise _refused(name, path, "is set-user-id or set-group-id")
    return Member(path=place, mode=mode, mtime=mtime, target=target, open=content)


def _stripped(members: list[Member]) -> list[Member]:
    """The members without the top folder, if one folder holds all of them."""
    tops = {member.path.parts[0] for member in members if member.path.parts}
    flat = any(len(member.path.parts) == 1 and not stat.S_ISDIR(member.mode) for member in members)
    if len(tops) != 1 or flat:
        return members
    return [replace(member, path=PurePosixPath(*member.path.parts[1:])) for member in members if len(member.path.parts) > 1]


def _write(member: Member, into: Path, written: set[Path], name: str) -> None:
    place = into / member.path
    make_parents(place, into, name)
    if stat.S_ISDIR(member.mode):
        if place.is_symlink() or (place.exists() and not place.is_dir()):
            raise _refused(name, str(member.path), "overwrites a file")
        place.mkdir(exist_ok=True)
        return
    if place in written:
        # A tar that was appended to has the member twice: the last one counts, as for tar.
        place.unlink()
    elif place.is_symlink() or place.exists():
        raise _refused(name, str(member.path), "overwrites an existing file")
    written.add(place)
    if stat.S_ISLNK(member.mode):
        place.symlink_to(member.target)
        return
    with member.open() as source, place.open("xb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
    place.chmod(0o755 if member.mode & stat.S_IXUSR else 0o644)


def make_parents(place: Path, tree: Path, name: str) -> None:
    """Create the folders above `place` inside `tree`. None of them may be a link: writing through one could leave the tree.

    Raises:
        SourceError: one of them is a link or a file.
    """
    folder = tree
    for part in place.parent.relative_to(tree).parts:
        folder /= part
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            raise _refused(
                name, str(place.relative_to(tree)), f"goes through {str(folder.relative_to(tree))!r}, which is not a folder"
            )
        folder.mkdir(exist_ok=True)


def _check_links(tree: Path, written: set[Path], name: str) -> None:
    """Check links after everything is unpacked, when the end of a chain of links is known."""
    root = tree.resolve()
    for path in written:
        if path.is_symlink():
            target = path.readlink()
            if target.is_absolute() or not path.resolve().is_relative_to(root):
                raise _refused(name, str(path.relative_to(tree)), f"is a link to {str(target)!r}, which is outside the tree")


def _refused(name: str, member: str, reason: str) -> SourceError:
    return SourceError(
        f"{name}: {member!r} {reason}",
        remedy="do not trust this archive: pin a different archive or a git commit; nothing was unpacked",
    )
