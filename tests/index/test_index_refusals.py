"""Refusals of input that other indexes accept: wrong digests, names, archives, framing."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import signal
import socket
import struct
import tarfile
import threading
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from index_kit import Server, metadata, run_index, sdist, serving, wheel

import index.intake.sdist
import index.intake.wheel
from index.errors import RefusedError
from index.intake.defects import Defects
from index.names import parse_filename
from index.serving.server import GRACE
from tests.processes import open_files


def refused(answer: httpx.Response, *words: str, status: int = 400) -> None:
    assert answer.status_code == status, answer.text
    for word in words:
        assert word in answer.text


def nothing_stored(server: Server, project: str) -> None:
    assert server.page(project).status_code == 404
    assert not list((server.root / "staging").iterdir())


@pytest.mark.parametrize("field", ["sha256_digest", "md5_digest", "blake2_256_digest"])
def test_a_wrong_digest_is_refused(shared: Server, field: str) -> None:
    name, content = wheel("digest_pkg")
    wrong = {"sha256_digest": "0" * 64, "md5_digest": "0" * 32, "blake2_256_digest": "0" * 64}[field]
    refused(shared.upload(name, content, form={field: wrong}), field)
    nothing_stored(shared, "digest-pkg")


@pytest.mark.parametrize("field", ["md5_digest", "blake2_256_digest"])
def test_a_wrong_digest_is_refused_when_it_comes_after_the_file(shared: Server, field: str) -> None:
    name, content = wheel("late_pkg")
    parts = [
        (None, ":action", b"file_upload"),
        (name, "content", content),
        (None, field, b"0" * (32 if field == "md5_digest" else 64)),
    ]
    body = b"".join(
        b'--b\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
        % (key.encode(), b'; filename="%s"' % filename.encode() if filename else b"", value)
        for filename, key, value in parts
    )
    answer = shared.client.post(
        "/legacy/",
        content=body + b"--b--\r\n",
        headers={"Content-Type": "multipart/form-data; boundary=b"},
        auth=("__token__", shared.token),
    )
    refused(answer, field)


def test_right_digests_of_every_kind_are_taken(shared: Server) -> None:
    name, content = wheel("digests_pkg")
    form = {
        "md5_digest": hashlib.md5(content).hexdigest(),
        "blake2_256_digest": hashlib.blake2b(content, digest_size=32).hexdigest(),
    }
    assert shared.upload(name, content, form=form).status_code == 200


def test_what_pypi_takes_of_older_clients_is_taken(shared: Server) -> None:
    """The action in the query, and a signature in addition to the file, which is ignored."""
    name, content = wheel("signed_pkg")
    answer = shared.client.post(
        "/legacy/?:action=file_upload",
        data={"protocol_version": "1"},
        files={"content": (name, content), "gpg_signature": (f"{name}.asc", b"-----BEGIN PGP SIGNATURE-----\n")},
        auth=("__token__", shared.token),
    )
    assert answer.status_code == 200, answer.text
    assert shared.client.get(shared.page("signed-pkg").json()["files"][0]["url"].replace("../..", "")).content == content
    assert not list((shared.root / "staging").iterdir())
    other = shared.client.post(
        "/legacy/?:action=doc_upload", files={"content": (name, content)}, auth=("__token__", shared.token)
    )
    refused(other, "'doc_upload'")


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


def test_form_that_disagrees_with_the_file_is_refused(shared: Server) -> None:
    name, content = wheel("form_pkg")
    refused(shared.upload(name, content, form={"name": "other"}), "'other'")
    refused(shared.upload(name, content, form={"version": "2.0"}), "'2.0'")
    refused(shared.upload(name, content, form={"version": "9" * 5000}), "the form names the version")
    refused(shared.upload(name, content, form={"filetype": "sdist"}), "'sdist'")
    refused(shared.upload(name, content, form={":action": "submit"}), "'submit'")
    nothing_stored(shared, "form-pkg")


def test_same_bytes_again_are_fine_and_other_bytes_are_not(shared: Server) -> None:
    name, content = wheel("twice_pkg")
    assert shared.upload(name, content).status_code == 200
    assert shared.upload(name, content).status_code == 200
    _, other = wheel("twice_pkg", files={"twice_pkg/__init__.py": b"changed = True\n"})
    refused(shared.upload(name, other), "File already exists")
    files = shared.page("twice-pkg").json()["files"]
    assert [item["hashes"]["sha256"] for item in files] == [hashlib.sha256(content).hexdigest()]


@pytest.mark.parametrize(
    "filename",
    [
        "Evil.Pkg-1.0-py3-none-any.whl",
        "evil.pkg-1.0-py3-none-any.whl",
        "Evil_Pkg-1.0-py3-none-any.whl",
        "evil_pkg-1.0-PY3-none-any.whl",
    ],
)
def test_other_spellings_of_a_name_are_refused(shared: Server, filename: str) -> None:
    name = filename.partition("-")[0]
    _, content = wheel(name)
    refused(shared.upload(filename, content, form={"name": name}), "canonical")


def test_one_release_has_one_spelling(shared: Server) -> None:
    assert shared.upload(*wheel("spelled_pkg", "1.0")).status_code == 200
    refused(shared.upload(*wheel("spelled_pkg", "1.0.0")), "files of this release, with the version 1.0")


PLAIN = "is not a plain file name"
NAMES = {
    # File name to send: project and version of the wheel inside (valid except for the name), and words of the error.
    "../up_pkg-1.0-py3-none-any.whl": ("up_pkg", "1.0", PLAIN),
    "../../../../../../tmp/gf_up_pkg-1.0-py3-none-any.whl": ("gf_up_pkg", "1.0", PLAIN),
    "/tmp/gf_abs_pkg-1.0-py3-none-any.whl": ("gf_abs_pkg", "1.0", PLAIN),
    "folder/in_pkg-1.0-py3-none-any.whl": ("in_pkg", "1.0", PLAIN),
    "..\\back_pkg-1.0-py3-none-any.whl": ("back_pkg", "1.0", PLAIN),
    "C:\\back_pkg-1.0-py3-none-any.whl": ("back_pkg", "1.0", PLAIN),
    "space pkg-1.0-py3-none-any.whl": ("space pkg", "1.0", PLAIN),
    "\u00e4_pkg-1.0-py3-none-any.whl": ("\u00e4_pkg", "1.0", PLAIN),
    ".hidden_pkg-1.0-py3-none-any.whl": (".hidden_pkg", "1.0", PLAIN),
    "nul\x00_pkg-1.0-py3-none-any.whl": ("nul_pkg", "1.0", ""),
    "trail_pkg-1.0-py3-none-any.whl ": ("trail_pkg", "1.0", PLAIN),
    "line_pkg-1.0-py3-none-any.whl\x0b": ("line_pkg", "1.0", PLAIN),
    "zip_pkg-1.0.zip": ("zip_pkg", "1.0", "neither a wheel nor an sdist"),
    "noversion.zip": ("noversion", "1.0", "neither a wheel nor an sdist"),
    "exe_pkg-1.0.exe": ("exe_pkg", "1.0", "neither a wheel nor an sdist"),
    "meta_pkg-1.0-py3-none-any.whl.metadata": ("meta_pkg", "1.0", "neither a wheel nor an sdist"),
    "short_pkg-1.0.whl": ("short_pkg", "1.0", "is not a wheel's name"),
    "not_pkg-not.a.version-py3-none-any.whl": ("not_pkg", "not.a.version", "is not a wheel's name"),
    "long_pkg-1.0+" + "l" * 260 + "-py3-none-any.whl": ("long_pkg", "1.0+" + "l" * 260, "longer than 255 bytes"),
}


@pytest.mark.parametrize("filename", NAMES)
def test_file_names_that_no_installer_means_are_refused(shared: Server, filename: str) -> None:
    """Each is refused for its name: the wheel inside is valid and has that project and version."""
    name, version, words = NAMES[filename]
    before = everything_beside(shared)
    answer = post_file(shared, filename, wheel(name, version)[1])
    if words:
        refused(answer, words)
    else:  # a NUL in a header: the form is refused before the name is read
        assert answer.status_code == 400
        assert answer.text.strip()
    assert everything_beside(shared) == before


@pytest.mark.parametrize(
    ("filename", "words"),
    [
        ("..-1.0.tar.gz", PLAIN),
        ("sdist_pkg-1.0.tar.bz2", "neither a wheel nor an sdist"),
        ("sdist_pkg.tar.gz", "not an sdist"),
    ],
)
def test_file_names_of_sdists_are_refused_for_their_name(shared: Server, filename: str, words: str) -> None:
    before = everything_beside(shared)
    refused(post_file(shared, filename, sdist(filename.partition("-")[0].removesuffix(".tar.gz"))[1]), words)
    assert everything_beside(shared) == before


def post_file(server: Server, filename: str, content: bytes) -> httpx.Response:
    """An upload with a raw file name, which a client would clean."""
    body = (
        b'--b\r\nContent-Disposition: form-data; name=":action"\r\n\r\nfile_upload\r\n'
        b'--b\r\nContent-Disposition: form-data; name="content"; filename="'
        + filename.replace("\\", "\\\\").encode()
        + b'"\r\n\r\n'
        + content
        + b"\r\n--b--\r\n"
    )
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    return server.client.post("/legacy/", content=body, headers=headers, auth=("__token__", server.token))


def everything_beside(server: Server) -> set[str]:
    """Every file in and around the root except catalogue and logs, and at the absolute names."""
    paths = {str(path) for path in server.root.parent.rglob("*") if path.suffix != ".log" and path.parent.name != "catalogue"}
    return paths | {str(path) for path in Path("/tmp").glob("gf_*_pkg*")}


def test_an_empty_file_name_is_refused(shared: Server) -> None:
    body = b'--b\r\nContent-Disposition: form-data; name=":action"\r\n\r\nfile_upload\r\n--b\r\n'
    body += b'Content-Disposition: form-data; name="content"; filename=""\r\n\r\nx\r\n--b--\r\n'
    answer = shared.client.post(
        "/legacy/", content=body, headers={"Content-Type": "multipart/form-data; boundary=b"}, auth=("__token__", shared.token)
    )
    refused(answer, "no file name")


def _zip(entries: list[tuple[zipfile.ZipInfo | str, bytes]], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return buffer.getvalue()


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
        "its WHEEL file has the tags",
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
    refused(shared.upload(name, b"#!/bin/sh\n" + content), "bytes that belong to no file")
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


def test_a_local_version_is_welcome(shared: Server) -> None:
    assert shared.upload(*wheel("local_pkg", "1.0+cu130")).status_code == 200
    assert shared.page("local-pkg").json()["files"][0]["_cuda"] == "13.0"


def test_sdists_are_read_too(shared: Server) -> None:
    assert shared.upload(*sdist("source_pkg")).status_code == 200
    assert shared.page("source-pkg").json()["files"][0]["core-metadata"] is False
    refused(shared.upload("source_pkg-2.0.tar.gz", b"no tar" * 99), "not a gzipped tar")
    refused(shared.upload(*sdist("source_pkg", "3.0", extra={"../evil.py": b"x"})), "outside its folder")
    refused(shared.upload("source_pkg-4.0.tar.gz", sdist("source_pkg", "1.0")[1]), "outside its folder")


def _half(server: Server, name: str, content: bytes, *, close: str, announce: int | None = None) -> None:
    head, body = _raw_form(server, name, content)
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head.replace(b"LENGTH", str(announce or len(body)).encode()) + body[: len(body) // 2])
        if close == "rst":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        else:
            connection.shutdown(socket.SHUT_WR)
            connection.settimeout(20)
            answer = connection.recv(4096)
            assert b"200 OK" not in answer


def _raw_form(server: Server, name: str, content: bytes, token: str | None = None) -> tuple[bytes, bytes]:
    secret = base64.b64encode(f"__token__:{token or server.token}".encode()).decode()
    body = b'--b\r\nContent-Disposition: form-data; name=":action"\r\n\r\nfile_upload\r\n'
    body += b'--b\r\nContent-Disposition: form-data; name="content"; filename="%s"\r\n\r\n' % name.encode()
    body += content + b"\r\n--b--\r\n"
    head = (
        f"POST /legacy/ HTTP/1.1\r\nHost: x\r\nAuthorization: Basic {secret}\r\n"
        "Content-Type: multipart/form-data; boundary=b\r\nContent-Length: LENGTH\r\n\r\n"
    )
    return head.encode(), body


@pytest.mark.parametrize("close", ["fin", "rst"])
def test_half_an_upload_leaves_nothing(shared: Server, close: str) -> None:
    name, content = wheel("half_pkg", files={"half_pkg/data": bytes(range(256)) * 32768}, compress=zipfile.ZIP_STORED)
    _half(shared, name, content, close=close)
    _eventually_empty(shared)
    nothing_stored(shared, "half-pkg")


def test_after_half_an_upload_the_whole_one_is_taken(shared: Server) -> None:
    name, content = wheel("again_pkg", files={"again_pkg/data": bytes(range(256)) * 32768}, compress=zipfile.ZIP_STORED)
    _half(shared, name, content, close="fin")
    assert shared.upload(name, content).status_code == 200
    assert shared.filenames("again-pkg") == [name]


def _eventually_empty(server: Server) -> None:
    for _ in range(200):
        if not list((server.root / "staging").iterdir()):
            return
        time.sleep(0.05)
    raise AssertionError("staging is not empty")


def test_a_cut_file_in_a_whole_form_is_refused(shared: Server) -> None:
    name, content = wheel("cut_pkg", files={"cut_pkg/data": bytes(range(256)) * 4096})
    refused(
        shared.upload(name, content[: len(content) // 2], form={"sha256_digest": hashlib.sha256(content).hexdigest()}),
        "sha256_digest",
    )
    nothing_stored(shared, "cut-pkg")


def test_a_stalled_upload_stops_nobody_and_ends(tmp_path_factory: pytest.TempPathFactory) -> None:
    with serving(tmp_path_factory.mktemp("stall") / "root", "--allow-new", "--idle", "1.5") as server:
        name, content = wheel("stall_pkg")
        head, body = _raw_form(server, name, content)
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(head.replace(b"LENGTH", str(len(body)).encode()) + body[:100])
            assert server.upload(*wheel("other_pkg")).status_code == 200
            assert server.filenames("other-pkg")
            connection.settimeout(30)
            assert b"408" in connection.recv(4096)
        _eventually_empty(server)


def test_clients_that_stop_reading_or_never_ask_stop_nobody(tmp_path: Path) -> None:
    """1,100 sockets of one address: more than granian's default limit on connections, at which it accepts no other client."""
    with serving(tmp_path / "root", "--allow-new") as server:
        name, content = wheel("slow_pkg", files={"slow_pkg/data": bytes(8 << 20)}, compress=zipfile.ZIP_STORED)
        assert server.upload(name, content).status_code == 200
        request = f"GET /packages/{name} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        held: list[socket.socket] = []
        try:
            # Most never read, some send half a request.
            held.extend(_slow_reader(server, request if number % 3 else request[:20]) for number in range(1100))

            def served(source: str) -> None:
                transport = httpx.HTTPTransport(local_address=source)
                with httpx.Client(base_url=server.url, timeout=60, transport=transport) as other:
                    assert other.get("/health").text == "ok\n"
                    assert other.get("/simple/slow-pkg/").status_code == 200
                    assert other.get(f"/packages/{name}").content == content

            served("127.0.0.2")
            deadline = time.monotonic() + 60
            while _connections(server) > 256 + 10 and time.monotonic() < deadline:
                time.sleep(0.2)
            assert _connections(server) <= 256 + 10, "one address keeps no more"
            # Not earlier: while an address has too many connections, any of its downloads may be disconnected.
            served("127.0.0.1")
            with httpx.Client(base_url=server.url, timeout=60) as other:  # the old one was as idle as the others
                assert other.get("/health").status_code == 200
                server.client = other
                assert server.upload(*wheel("quick_pkg")).status_code == 200
        finally:
            for connection in held:
                connection.close()


def _slow_reader(server: Server, request: bytes) -> socket.socket:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", server.port))
    connection.sendall(request)
    return connection


def _connections(server: Server, port: int | None = None) -> int:
    """Open connections of clients; with `port`, of the client on that port."""
    inodes = set(open_files(server.process.pid))
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    mine = [row for row in rows if int(row[1].partition(":")[2], 16) == server.port and row[3] != "0A"]
    mine = [row for row in mine if port is None or int(row[2].partition(":")[2], 16) == port]
    return sum(f"socket:[{row[9]}]" in inodes for row in mine)


def test_who_takes_nothing_of_an_answer_is_cut_off(tmp_path: Path) -> None:
    with serving(tmp_path / "root", "--allow-new", "--idle", "1.5") as server:
        name, content = wheel("slow_pkg", files={"slow_pkg/data": bytes(16 << 20)}, compress=zipfile.ZIP_STORED)
        assert server.upload(name, content).status_code == 200
        request = f"GET /packages/{name} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        with _slow_reader(server, request) as reader:
            port = reader.getsockname()[1]
            assert reader.recv(8) == b"HTTP/1.1"
            assert _connections(server, port) == 1
            deadline = time.monotonic() + 12  # before granian's limit on idle connections, which is 15 s
            while _connections(server, port) and time.monotonic() < deadline:
                time.sleep(0.1)
            assert _connections(server, port) == 0


@pytest.mark.parametrize("signals", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_client_that_stalls_does_not_keep_the_server_from_ending(tmp_path: Path, signals: int) -> None:
    with serving(tmp_path / "root", "--allow-new") as server:
        name, content = wheel("ending_pkg", files={"ending_pkg/data": bytes(16 << 20)}, compress=zipfile.ZIP_STORED)
        assert server.upload(name, content).status_code == 200
        request = f"GET /packages/{name} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        with _slow_reader(server, request) as stalled, _slow_reader(server, request) as reads:
            assert stalled.recv(8) == reads.recv(8) == b"HTTP/1.1"
            begun = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            with reads.makefile("rb") as stream:
                assert stream.read().endswith(content), "open requests may finish"
            assert server.process.poll() is None
            if signals == 2:
                server.process.send_signal(signal.SIGINT)
            assert server.process.wait(GRACE + 10 if signals == 1 else GRACE / 2) == 0
            assert (time.monotonic() - begun > GRACE - 1) == (signals == 1)


def test_one_connection_is_one_answer_at_a_time(tmp_path: Path) -> None:
    """With HTTP/2, each connection could hold 200 unread responses, which no limit counts."""
    with (
        serving(tmp_path / "root") as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection,
    ):
        settings = b"\0\0\0\4\0\0\0\0\0"
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings)
        answer = connection.recv(1000)
        assert answer == b"" or answer.startswith(b"HTTP/1.1 4")


def test_open_uploads_of_one_client_are_bounded(tmp_path_factory: pytest.TempPathFactory) -> None:
    with serving(
        tmp_path_factory.mktemp("bound") / "root", "--allow-new", "--open-uploads-per-client", "2", "--waiting-uploads", "1"
    ) as server:
        name, content = wheel("bound_pkg")
        head, body = _raw_form(server, name, content)
        held = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(2)]
        for connection in held:
            connection.sendall(head.replace(b"LENGTH", str(len(body)).encode()) + body[:100])
        await_metric(server, "open_uploads 2.0")
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(server.upload, name, content)
            await_metric(server, "waiting_uploads 1.0")
            with httpx.Client(base_url=server.url) as client:
                other = Server(**{**vars(server), "client": client})
                refused(other.upload(*wheel("over_pkg")), "too many uploads are waiting already", status=429)
            assert not waiting.done()
            for connection in held:
                connection.close()
            assert waiting.result(20).status_code == 200
        await_metric(server, "open_uploads 0.0")


def await_metric(server: Server, line: str) -> None:
    with httpx.Client(base_url=server.url) as client:
        for _ in range(200):
            if f"gracefarm_index_{line}" in client.get("/metrics").text:
                return
            time.sleep(0.05)
    raise AssertionError(f"the metrics never said {line}")


def test_more_uploads_than_may_be_open_wait_and_succeed(tmp_path_factory: pytest.TempPathFactory) -> None:
    with serving(tmp_path_factory.mktemp("queue") / "root", "--allow-new", "--open-uploads-per-client", "2") as server:

        def send(number: int) -> int:
            blob = {f"queued_{number}/blob": bytes([number]) * (4 << 20)}
            with httpx.Client(base_url=server.url, timeout=60) as client:
                return Server(**{**vars(server), "client": client}).upload(*wheel(f"queued_{number}", files=blob)).status_code

        with ThreadPoolExecutor(20) as pool:
            assert list(pool.map(send, range(20))) == [200] * 20


def test_writes_are_rate_limited(tmp_path_factory: pytest.TempPathFactory) -> None:
    with serving(tmp_path_factory.mktemp("rate") / "root", "--allow-new", "--writes-per-second", "1") as server:
        statuses = [server.client.post("/legacy/").status_code for _ in range(6)]
        assert statuses[0] == 401
        assert statuses[-1] == 429


def test_size_is_limited(tmp_path_factory: pytest.TempPathFactory) -> None:
    with serving(tmp_path_factory.mktemp("size") / "root", "--allow-new", "--max-upload", "100000") as server:
        name, content = wheel("size_pkg", files={"size_pkg/data": bytes(200_000)}, compress=zipfile.ZIP_STORED)
        refused(server.upload(name, content), "100000", status=413)

        def chunks() -> object:
            yield from (body[start : start + 4096] for start in range(0, len(body), 4096))

        _, body = _raw_form(server, name, content)
        answer = server.client.post(
            "/legacy/",
            content=chunks(),
            headers={"Content-Type": "multipart/form-data; boundary=b"},
            auth=("__token__", server.token),
        )
        refused(answer, "100000", status=413)
        nothing_stored(server, "size-pkg")


def test_one_of_eight_concurrent_uploads_of_one_name_wins(shared: Server) -> None:
    barrier = threading.Barrier(8)

    def send(number: int) -> int:
        name, content = wheel("race_pkg", files={"race_pkg/__init__.py": f"N = {number}\n".encode()})
        barrier.wait()
        return shared.upload(name, content).status_code

    with ThreadPoolExecutor(8) as pool:
        statuses = sorted(pool.map(send, range(8)))
    assert statuses == [200] + [400] * 7
    assert len(shared.filenames("race-pkg")) == 1


def test_names_that_nobody_hosts_are_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    with serving(tmp_path_factory.mktemp("host") / "root") as server:
        refused(server.upload(*wheel("new_pkg")), "does not host new-pkg", status=403)
        nothing_stored(server, "new-pkg")
        run_index(server.root, "host", "New.Pkg")
        assert server.upload(*wheel("new_pkg")).status_code == 200
        run_index(server.root, "host", "--remove", "new-pkg")
        refused(server.upload(*wheel("new_pkg", "2.0")), "does not host", status=403)
        assert server.filenames("new-pkg") == ["new_pkg-1.0-py3-none-any.whl"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--b--\r\n",
        b"nonsense",
        b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n",
        b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\n\xff\xfe\r\n--b--\r\n',
        b'--b\r\nContent-Disposition: form-data; name=":action"\r\n\r\nfile_upload\r\n--b--\r\n',
    ],
)
def test_forms_that_are_none_are_refused(shared: Server, body: bytes) -> None:
    answer = shared.client.post(
        "/legacy/", content=body, headers={"Content-Type": "multipart/form-data; boundary=b"}, auth=("__token__", shared.token)
    )
    assert answer.status_code == 400, answer.text


def test_another_content_type_is_refused(shared: Server) -> None:
    answer = shared.client.post(
        "/legacy/", content=b"{}", headers={"Content-Type": "application/json"}, auth=("__token__", shared.token)
    )
    refused(answer, "multipart/form-data")


@pytest.mark.parametrize(
    ("tags", "kind"), [("py3-none-notatag", "platform"), ("zz9-none-any", "Python"), ("py3-what-any", "ABI")]
)
def test_a_wheel_that_no_installer_would_choose_is_refused(shared: Server, tags: str, kind: str) -> None:
    refused(shared.upload(*wheel("tagged_pkg", tags=tags)), f"not a known {kind} tag")


@pytest.mark.parametrize("name", [".hidden", "a b", "\u00e4"])
def test_odd_names_are_refused_for_their_name(shared: Server, name: str) -> None:
    refused(shared.upload(*wheel(name)), "not a plain file name")
