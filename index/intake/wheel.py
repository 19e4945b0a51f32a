"""Checks of a wheel (PEP 427): one .dist-info folder with the right name, and a RECORD that matches every byte."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from packaging.tags import parse_tag
from packaging.utils import canonicalize_name

from gracefarm import variants
from gracefarm.files import CHUNK
from index.errors import RefusedError
from index.intake import entry_points, metadata
from index.intake.archive import open_zip
from index.intake.defects import Defects
from index.intake.metadata import Metadata
from index.names import Distribution, same_version

RECORD_NAME = "gracefarm.json"
"The farm's record of build inputs inside .dist-info (docs/reference/index-records.md)."

MAX_VARIANT = 1 << 16
"Maximum bytes of a variant.json. A page combines those of all wheels of a release."

_UNRECORDED = ("RECORD", "RECORD.jws", "RECORD.p7s")
_HASHES = ("sha256", "sha384", "sha512")


def inspect(path: Path, defects: Defects) -> tuple[Metadata, bytes | None, str | None]:
    """Check the whole wheel at `path`; return its metadata, and the farm's record and variant.json if it contains them.

    Reads every byte, which takes seconds for gigabytes: do not call it on the event loop.

    Raises:
        RefusedError: the wheel is invalid.
    """
    distribution = defects.distribution
    with open_zip(path, distribution.filename) as archive:
        folder = _dist_info(archive, distribution)
        _check_wheel(archive, folder, defects)
        _check_record(archive, folder, distribution)

        def has_licence(name: str) -> bool:
            return f"{folder}/licenses/{name}" in archive.NameToInfo

        core_metadata = metadata.read(_small(archive, f"{folder}/METADATA", distribution), defects, has_licence)
        if (points := f"{folder}/entry_points.txt") in archive.NameToInfo:
            entry_points.check(_small(archive, points, distribution), defects)
        record = f"{folder}/{RECORD_NAME}"
        return (
            core_metadata,
            _small(archive, record, distribution) if record in archive.NameToInfo else None,
            _variant(archive, folder, distribution),
        )


def read_locked(path: Path, defects: Defects) -> Metadata | None:
    """METADATA of a wheel with a locked digest, trusted as far as the lock is. None if the wheel has no readable METADATA.

    Raises:
        RefusedError: with this file, installers would fail on the whole project.
    """
    wanted = f"{defects.distribution.stem}.dist-info".lower()
    try:
        with zipfile.ZipFile(path) as archive:
            folder = next((name.split("/")[0] for name in archive.namelist() if name.split("/")[0].lower() == wanted), wanted)
            member = archive.NameToInfo.get(f"{folder}/METADATA")
            if member is None or member.file_size > metadata.MAX_METADATA:
                return None
            return metadata.read(archive.read(member), defects, lambda name: f"{folder}/licenses/{name}" in archive.NameToInfo)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError):
        return None


def _variant(archive: zipfile.ZipFile, folder: str, distribution: Distribution) -> str | None:
    """variant.json, which must match the label in the file name; None for a plain wheel."""
    member = f"{folder}/{variants.MEMBER}"
    there = member in archive.NameToInfo
    if there != bool(distribution.variant):
        raise RefusedError(
            f"{distribution.filename} contains {member}, but the file name has no variant label"
            if there
            else f"{distribution.filename} has a variant label in the file name, but contains no {member}",
            remedy="build the wheel again; a variant wheel must have a label in its name and a variant.json (PEP 825)",
        )
    if not there:
        return None
    raw = _small(archive, member, distribution)
    if len(raw) > MAX_VARIANT:
        raise RefusedError(f"{distribution.filename}: {member} has {len(raw)} bytes, which is too long", remedy="shorten it")
    try:
        variants.parse(raw, distribution.variant)
    except ValueError as error:
        raise RefusedError(
            f"{distribution.filename}: {error}", remedy="build it again; see docs/reference/index-variants.md"
        ) from None
    return raw.decode()  # parse accepts only UTF-8


def _dist_info(archive: zipfile.ZipFile, distribution: Distribution) -> str:
    folders = {name.split("/")[0] for name in archive.namelist() if name.split("/")[0].endswith(".dist-info")}
    if len(folders) != 1:
        raise RefusedError(
            f"{distribution.filename} contains {len(folders)} .dist-info folders",
            remedy="build it again; a wheel has exactly one (PEP 427)",
        )
    folder = folders.pop()
    name, _, version = folder.removesuffix(".dist-info").rpartition("-")
    version = version if "+" in version else version.replace("_", "+", 1)
    if canonicalize_name(name) != distribution.project or not same_version(version, distribution.version):
        raise RefusedError(
            f"{distribution.filename} contains {folder}, but the file name has a different name or version",
            remedy="build the wheel again; the file was renamed",
        )
    return folder


def _small(archive: zipfile.ZipFile, name: str, distribution: Distribution) -> bytes:
    try:
        member = archive.getinfo(name)
    except KeyError:
        raise RefusedError(f"{distribution.filename} lacks {name}", remedy="build it again with a PEP 517 backend") from None
    if member.file_size > metadata.MAX_METADATA:
        raise RefusedError(
            f"{distribution.filename}: {name} has {member.file_size} bytes, which is too long", remedy="shorten it"
        )
    return archive.read(member)


def _check_wheel(archive: zipfile.ZipFile, folder: str, defects: Defects) -> None:
    """WHEEL must contain the same tags as the file name: installers trust WHEEL, resolvers trust the name."""
    distribution = defects.distribution
    text = _small(archive, f"{folder}/WHEEL", distribution).decode("utf-8", "replace")
    tags = {tag for line in text.splitlines() if line.lower().startswith("tag:") for tag in parse_tag(line[4:].strip())}
    if tags and tags != distribution.tags:
        defects.note(
            f"its WHEEL file has the tags {', '.join(sorted(map(str, tags)))}",
            remedy="retag the wheel with `python -m wheel tags`, which changes the file name and the WHEEL file",
        )


def _check_record(archive: zipfile.ZipFile, folder: str, distribution: Distribution) -> None:
    listed = _record(archive, folder, distribution)
    present = {name for name in archive.namelist() if not name.endswith("/")}
    excused = {f"{folder}/{name}" for name in _UNRECORDED}
    if missing := sorted(present - listed.keys() - excused):
        raise RefusedError(
            f"{distribution.filename}: {missing[0]} is not in RECORD", remedy="build the wheel again; files were added to it"
        )
    if absent := sorted(listed.keys() - present):
        raise RefusedError(
            f"{distribution.filename}: RECORD lists {absent[0]}, which is missing", remedy="build the wheel again"
        )
    for name in sorted(present - excused):
        digest, size = listed[name]
        if _digest(archive, name, digest.partition("=")[0], distribution) != digest:
            raise RefusedError(
                f"{distribution.filename}: {name} does not match RECORD", remedy="build the wheel again; it was changed"
            )
        if size and size != str(archive.getinfo(name).file_size):
            raise RefusedError(f"{distribution.filename}: RECORD has a wrong size for {name}", remedy="build the wheel again")


def _record(archive: zipfile.ZipFile, folder: str, distribution: Distribution) -> dict[str, tuple[str, str]]:
    try:
        rows = list(csv.reader(io.StringIO(_small(archive, f"{folder}/RECORD", distribution).decode("utf-8")), strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise RefusedError(
            f"{distribution.filename}: RECORD is not readable: {error}", remedy="build the wheel again"
        ) from None
    listed: dict[str, tuple[str, str]] = {}
    for row in rows:
        if not row:
            continue
        if len(row) != 3 or row[0] in listed:
            raise RefusedError(
                f"{distribution.filename}: RECORD has an invalid line {','.join(row)!r}", remedy="build the wheel again"
            )
        listed[row[0]] = (row[1], row[2])
    return listed


def _digest(archive: zipfile.ZipFile, name: str, algorithm: str, distribution: Distribution) -> str:
    if algorithm not in _HASHES:
        raise RefusedError(
            f"{distribution.filename}: RECORD has neither a sha256 nor a longer hash of {name}",
            remedy="build the wheel again with a current tool",
        )
    digest = hashlib.new(algorithm)
    try:
        with archive.open(name) as stream:
            while chunk := stream.read(CHUNK):
                digest.update(chunk)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise RefusedError(
            f"{distribution.filename}: {PurePosixPath(name).name} cannot be unpacked: {error}", remedy="upload it again"
        ) from None
    return f"{algorithm}={base64.urlsafe_b64encode(digest.digest()).rstrip(b'=').decode()}"
