"""The index refuses damaged and dangerous archives: RECORD, paths, links, bombs, damaged data."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from index_kit import Server, metadata, nothing_stored, refused, sdist, wheel

import index.intake.sdist
import index.intake.wheel
from index.errors import RefusedError
from index.intake.defects import Defects
from index.names import parse_filename


def test_not_a_zip_is_refused(shared: Server) -> None:
    refused(shared.upload("nozip_pkg-1.0-py3-none-any.whl", b"not a zip" * 100), "not a zip archive")
    nothing_stored(shared, "nozip-pkg")


def test_metadata_of_another_name_is_refused(shared: Server) -> None:
    name, content = wheel("meta_pkg", meta=metadata("other", "1.0"))
    refused(shared.upload(name, content), "'other'")


def test_metadata_of_another_version_is_refused(shared: Server) -> None:
    name, content = wheel("meta_pkg", meta=metadata("meta_pkg", "2.0"))
    refused(shared.upload(name, content), "'2.0'")
    refused(shared.upload(*wheel("meta_pkg", meta=metadata("meta_pkg", "9" * 5000))), "Version in its metadata is")


def test_record_that_does_not_match_is_refused(shared: Server) -> None:
    name, _ = wheel("rec_pkg")
    refused(shared.upload(*wheel("rec_pkg", record="")), "is not in RECORD")
    good = wheel("rec_pkg")[1]
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        listing = archive.read("rec_pkg-1.0.dist-info/RECORD").decode()
    refused(
        shared.upload(name, wheel("rec_pkg", record=listing.replace("sha256=", "sha256=A", 1))[1]), "does not match RECORD"
    )
    refused(shared.upload(name, wheel("rec_pkg", record=listing + "ghost.py,sha256=x,1\n")[1]), "ghost.py")
    refused(shared.upload(name, wheel("rec_pkg", record=listing.replace("sha256=", "md5=", 1))[1]), "sha256")
    sizes = listing.splitlines()
    sizes[0] = sizes[0].rpartition(",")[0] + ",99999"
    refused(shared.upload(name, wheel("rec_pkg", record="\n".join(sizes))[1]), "wrong size")


def test_an_unrecorded_file_is_refused(shared: Server) -> None:
    name, content = wheel("added_pkg")
    buffer = io.BytesIO(content)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr("added_pkg/extra.py", b"evil = True\n")
    refused(shared.upload(name, buffer.getvalue()), "added_pkg/extra.py is not in RECORD")


def test_two_dist_infos_are_refused(shared: Server) -> None:
    refused(shared.upload(*wheel("two_pkg", files={"other-1.0.dist-info/METADATA": b"Name: other\n"})), "2 .dist-info")


def test_dist_info_of_another_name_is_refused(shared: Server) -> None:
    refused(shared.upload(*wheel("info_pkg", dist_info="other-1.0.dist-info")), "other-1.0.dist-info")


def test_wheel_tags_that_disagree_are_refused(shared: Server) -> None:
    refused(
        shared.upload(*wheel("tags_pkg", tags="py3-none-any", wheel_tags="cp311-cp311-linux_aarch64")),
        "its WHEEL file has other tags than the file name",
    )


def test_a_zip_bomb_is_refused(shared: Server) -> None:
    refused(shared.upload(*wheel("bomb_pkg", files={"bomb_pkg/zeros": bytes(80 << 20)})), "zip bomb")


@pytest.mark.parametrize(
    "path", ["../out.py", "/etc/out.py", "a/../../out.py", "a\\..\\out.py", "C:/out.py", "./out.py", "a//b.py"]
)
def test_a_path_that_leaves_the_wheel_is_refused(shared: Server, path: str) -> None:
    refused(shared.upload(*wheel("path_pkg", files={path: b"x"})), "is not a plain relative path")


def test_a_symlink_in_a_wheel_is_refused(shared: Server) -> None:
    name, content = wheel("link_pkg")
    buffer = io.BytesIO(content)
    link = zipfile.ZipInfo("link_pkg/link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr(link, b"/etc/passwd")
    refused(shared.upload(name, buffer.getvalue()), "symbolic link")


def test_bytes_around_the_archive_are_refused(shared: Server) -> None:
    name, content = wheel("around_pkg")
    refused(shared.upload(name, b"#!/bin/sh\n" + content), "that belong to no file")
    refused(shared.upload(name, content + b"trailer"), "bytes after the end")


def test_a_name_twice_in_a_wheel_is_refused(shared: Server) -> None:
    name, content = wheel("dup_pkg")
    buffer = io.BytesIO(content)
    with zipfile.ZipFile(buffer, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("dup_pkg/__init__.py", b"second = True\n")
    refused(shared.upload(name, buffer.getvalue()), "twice")


def test_an_encrypted_member_is_refused(shared: Server) -> None:
    name, content = wheel("crypt_pkg")
    position = content.index(b"PK\x01\x02")
    changed = bytearray(content)
    changed[position + 8] |= 1
    changed[6] |= 1
    refused(shared.upload(name, bytes(changed)), "encrypted")


def test_a_local_header_that_names_another_file_is_refused(shared: Server) -> None:
    name, content = wheel("header_pkg")
    changed = content.replace(b"header_pkg/__init__.py", b"header_pkg/__evil__.py", 1)
    refused(shared.upload(name, changed), "names a different file")


@pytest.mark.parametrize("part", ["WHEEL", "RECORD", "METADATA"])
def test_damaged_data_of_a_small_file_is_refused(shared: Server, part: str) -> None:
    """A stream that zlib cannot read, although the digest of the upload is right."""
    name, content = wheel("torn_pkg")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        member = archive.getinfo(f"torn_pkg-1.0.dist-info/{part}")
    start = member.header_offset + 30 + len(member.filename)
    changed = content[:start] + b"\xff" * member.compress_size + content[start + member.compress_size :]
    refused(shared.upload(name, changed), "torn_pkg-1.0")
    nothing_stored(shared, "torn-pkg")


def peak_of(inspect: Callable[[Path, Defects], object], path: Path) -> tuple[int, str]:
    """Peak memory of a refusal, and its message."""
    tracemalloc.start()
    try:
        with pytest.raises(RefusedError) as refusal:
            inspect(path, Defects(distribution=parse_filename(path.name)))
        return tracemalloc.get_traced_memory()[1], str(refusal.value)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])
def test_a_bomb_in_the_headers_of_an_sdist_is_refused(tmp_path: Path, kind: bytes) -> None:
    """tarfile reads a whole extended header before it returns a member."""
    header = tarfile.TarInfo("bomb_pkg-1.0/PaxHeaders")
    header.type, header.size = kind, 300 << 20
    path = tmp_path / "bomb_pkg-1.0.tar.gz"
    with gzip.open(path, "wb", compresslevel=1) as stream:
        stream.write(header.tobuf(tarfile.USTAR_FORMAT))
        for _ in range(300):
            stream.write(bytes(1 << 20))
        stream.write(sdist("bomb_pkg")[1])
    assert path.stat().st_size < 3 << 20
    peak, sentence = peak_of(index.intake.sdist.inspect, path)
    assert peak < 16 << 20
    assert "a tar header of 314572800 bytes" in sentence


def test_headers_upon_headers_are_refused(tmp_path: Path) -> None:
    header = tarfile.TarInfo("chain_pkg-1.0/PaxHeaders")
    header.type, header.size = b"g", 8
    path = tmp_path / "chain_pkg-1.0.tar.gz"
    with gzip.open(path, "wb", compresslevel=1) as stream:
        stream.write((header.tobuf(tarfile.USTAR_FORMAT) + b"8 a=bcd\n".ljust(512, b"\0")) * 20_000)
    peak, _ = peak_of(index.intake.sdist.inspect, path)
    assert peak < 64 << 20


@pytest.mark.parametrize("comment", [b"", b"so that the end record is not at the end"])
def test_a_zip_of_too_many_files_is_refused_before_it_is_read(tmp_path: Path, comment: bytes) -> None:
    """A directory of half a million entries: zipfile creates an object for each entry before they can be counted."""
    entry = struct.pack("<4s4B4HL2L5H2L", b"PK\x01\x02", 20, 0, 20, 0, 0, 0, 0, 0x21, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    directory = entry * 500_000
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, len(directory), 0, len(comment)) + comment
    path = tmp_path / "many_pkg-1.0-py3-none-any.whl"
    path.write_bytes(directory + end)
    peak, sentence = peak_of(index.intake.wheel.inspect, path)
    assert peak < 40 << 20
    assert ("bytes after the end" if comment else "contains 500000 files") in sentence


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_metadata_of_fields_without_end_is_refused_before_it_is_parsed(shared: Server, kind: str) -> None:
    """Each field name is searched among all fields: a hundred thousand take an hour."""
    meta = metadata("fields_pkg", "1.0").replace(
        b"Summary", b"".join(b"X%d: y\n" % number for number in range(100_000)) + b"Summary"
    )
    made = wheel("fields_pkg", meta=meta) if kind == "wheel" else sdist("fields_pkg", meta=meta)
    refused(shared.upload(*made), "fields")


def test_sdists_are_read_too(shared: Server) -> None:
    assert shared.upload(*sdist("source_pkg")).status_code == 200
    assert shared.page("source-pkg").json()["files"][0]["core-metadata"] is False
    refused(shared.upload("source_pkg-2.0.tar.gz", b"no tar" * 99), "not a gzipped tar")
    refused(shared.upload(*sdist("source_pkg", "3.0", extra={"../evil.py": b"x"})), "outside its folder")
    refused(shared.upload("source_pkg-4.0.tar.gz", sdist("source_pkg", "1.0")[1]), "outside its folder")
