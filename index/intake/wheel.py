"""Checks of a wheel (PEP 427): one .dist-info folder with the right name, and a RECORD that matches every byte."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from packaging.utils import canonicalize_name

from gracefarm import variants
from gracefarm.files import CHUNK
from index.errors import RefusedError
from index.intake import entry_points, metadata, wheel_file
from index.intake.archive import open_zip
from index.intake.defects import Defects
from index.intake.metadata import Metadata
from index.names import Distribution, same_version

RECORD_NAME = "gracefarm.json"
"The builder's record of build inputs inside .dist-info (docs/reference/index-records.md)."

MAX_VARIANT = 1 << 16
"Maximum bytes of a variant.json. A page combines those of all wheels of a release."

_UNRECORDED = ("RECORD", "RECORD.jws", "RECORD.p7s")
_HASHES = ("sha256", "sha384", "sha512")


def inspect(path: Path, defects: Defects, *, locked: bool = False) -> tuple[Metadata, bytes | None, str | None]:
    """Check the whole wheel at `path`; return its metadata, and the builder's record and variant.json if it contains them.

    Reads every byte, which takes seconds for gigabytes: do not call it on the event loop. The bytes of a `locked` wheel are
    those that a lock names, so they are not compared with RECORD.

    Raises:
        RefusedError: the wheel is invalid.
    """
    distribution = defects.distribution
    with open_zip(path, distribution.filename) as archive:
        folder = _dist_info(archive, distribution)
        wheel_file.check(_small(archive, f"{folder}/WHEEL", distribution), defects)
        wheel_file.check_data(archive.namelist(), defects)
        rows = _rows(archive, folder, defects)
        if not locked:
            _check_record(archive, folder, _record(rows, distribution), distribution)

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
        raise RefusedError(
            f"{distribution.filename}: {member} has {len(raw)} bytes, which is too long",
            remedy="shorten this file, and build again",
        )
    try:
        variants.parse(raw, distribution.variant)
    except ValueError as error:
        raise RefusedError(
            f"{distribution.filename}: {error}", remedy="build the wheel again, as docs/reference/index-variants.md describes"
        ) from None
    return raw.decode()  # parse accepts only UTF-8


def _dist_info(archive: zipfile.ZipFile, distribution: Distribution) -> str:
    folders = {name.split("/")[0] for name in archive.namelist() if name.split("/")[0].endswith(".dist-info")}
    if len(folders) != 1:
        raise RefusedError(
            f"{distribution.filename} contains {len(folders)} .dist-info folders",
            remedy="build the wheel again, with exactly one .dist-info folder (PEP 427)",
        )
    folder = folders.pop()
    name, _, version = folder.removesuffix(".dist-info").rpartition("-")
    version = version if "+" in version else version.replace("_", "+", 1)
    if canonicalize_name(name) != distribution.project or not same_version(version, distribution.version):
        raise RefusedError(
            f"{distribution.filename} contains {folder}, but the file name has a different name or version",
            remedy="build the wheel again, since the file was renamed",
        )
    return folder


def _small(archive: zipfile.ZipFile, name: str, distribution: Distribution) -> bytes:
    try:
        member = archive.getinfo(name)
    except KeyError:
        raise RefusedError(
            f"{distribution.filename} lacks {name}", remedy="build the wheel again with a PEP 517 backend"
        ) from None
    if member.file_size > metadata.MAX_METADATA:
        raise RefusedError(
            f"{distribution.filename}: {name} has {member.file_size} bytes, which is too long",
            remedy="shorten this file, and build again",
        )
    return archive.read(member)


def _check_record(
    archive: zipfile.ZipFile, folder: str, listed: dict[str, tuple[str, str]], distribution: Distribution
) -> None:
    present = {name for name in archive.namelist() if not name.endswith("/")}
    excused = {f"{folder}/{name}" for name in _UNRECORDED}
    if missing := sorted(present - listed.keys() - excused):
        raise RefusedError(
            f"{distribution.filename}: {missing[0]} is not in RECORD",
            remedy="build the wheel again, since files were added to it",
        )
    if absent := sorted(listed.keys() - present):
        raise RefusedError(
            f"{distribution.filename}: RECORD lists {absent[0]}, which is missing", remedy="build the wheel again"
        )
    for name in sorted(present - excused):
        digest, size = listed[name]
        if _digest(archive, name, digest.partition("=")[0], distribution) != digest:
            raise RefusedError(
                f"{distribution.filename}: {name} does not match RECORD", remedy="build the wheel again, since it was changed"
            )
        if size and size != str(archive.getinfo(name).file_size):
            raise RefusedError(f"{distribution.filename}: RECORD has a wrong size for {name}", remedy="build the wheel again")


def _rows(archive: zipfile.ZipFile, folder: str, defects: Defects) -> list[list[str]]:
    """The lines of RECORD. Installers read them, but do not compare the digests.

    Raises:
        RefusedError: pip or uv cannot read them.
    """
    remedy = "build the wheel again"
    raw = _small(archive, f"{folder}/RECORD", defects.distribution)
    try:
        rows = list(csv.reader(io.StringIO(raw.decode("utf-8")), strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        defects.refuse(f"RECORD is not readable: {error}", remedy=remedy)
    for row in rows:
        if len(row) != 3 or not (row[2] == "" or (row[2].isascii() and row[2].isdigit())):
            defects.refuse(f"RECORD has an invalid line {','.join(row)[:200]!r}", remedy=remedy)
    return rows


def _record(rows: list[list[str]], distribution: Distribution) -> dict[str, tuple[str, str]]:
    listed: dict[str, tuple[str, str]] = {}
    for name, digest, size in rows:
        if name in listed:
            raise RefusedError(f"{distribution.filename}: RECORD lists {name!r} twice", remedy="build the wheel again")
        listed[name] = (digest, size)
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
            f"{distribution.filename}: {PurePosixPath(name).name} cannot be unpacked: {error}",
            remedy="upload the wheel again; if this fails, build the wheel again",
        ) from None
    return f"{algorithm}={base64.urlsafe_b64encode(digest.digest()).rstrip(b'=').decode()}"
