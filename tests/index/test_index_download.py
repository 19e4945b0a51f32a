"""Downloads of whole files, from memory and from a slow disk; nothing is read for a client that disconnects."""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
import time
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from index_kit import Server, serving, wheel
from starlette.types import Message

from index.serving import download
from index.serving.download import PIECE, WINDOW, Downloads, FileAnswer
from tests.processes import open_files

LARGE = (
    os.urandom(WINDOW) * 25
)  # large, so that only a small part is read before the server notices that the client has disconnected


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, str, str]]:
    """A server, the path of its large file and the file's digest."""
    name, content = wheel("large", files={"large/data.bin": LARGE}, compress=zipfile.ZIP_STORED)
    with serving(tmp_path_factory.mktemp("loaded") / "root", "--allow-new") as server:
        assert server.upload(name, content).status_code == 200
        item = server.page("large").json()["files"][0]
        digest = hashlib.sha256(content).hexdigest()
        assert item["hashes"]["sha256"] == digest
        yield server, f"/files/{digest}/{name}", digest


def test_a_large_file_arrives_whole_and_the_log_has_its_size(loaded: tuple[Server, str, str]) -> None:
    server, path, digest = loaded
    server.forget()
    answer = server.client.get(path)
    assert hashlib.sha256(answer.content).hexdigest() == digest
    assert answer.headers["content-length"] == str(len(answer.content))
    assert [(line.status, line.size) for line in server.requests()] == [(200, len(answer.content))]
    parts = [server.client.get(path, headers={"Range": f"bytes={at}"}) for at in ("0-999999", "1000000-")]
    assert [part.status_code for part in parts] == [206, 206]
    assert b"".join(part.content for part in parts) == answer.content
    server.forget()
    other = server.client.get(path, headers={"Range": "bytes=0-9", "If-Range": '"another"'})
    assert (other.status_code, other.content) == (200, answer.content)
    assert [(line.status, line.size) for line in server.requests()] == [(200, len(answer.content))]


def test_who_leaves_is_not_read_for(loaded: tuple[Server, str, str]) -> None:
    server, path, _ = loaded
    server.forget()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
    deadline = time.monotonic() + 20
    while not (lines := server.requests()):
        assert time.monotonic() < deadline
    assert 0 < lines[0].size < len(LARGE) - WINDOW
    assert not _sending(server)


@pytest.mark.parametrize("span", ["", "Range: bytes=1-\r\n"], ids=["whole", "range"])
def test_many_who_do_not_read_cost_little_memory(loaded: tuple[Server, str, str], span: str) -> None:
    """With pieces of full size, each download would use 3 MiB: granian queues eight."""
    server, path, _ = loaded
    before = _resident(server.process.pid)
    with ExitStack() as stack:
        for _ in range(150):
            connection = stack.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", server.port))
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n{span}\r\n".encode())
        deadline, last = time.monotonic() + 30, 0
        while (now := _resident(server.process.pid)) != last or len(_sending(server)) < 150:
            assert time.monotonic() < deadline
            last = now
            time.sleep(0.5)
        assert now - before < 200 << 20
    while _sending(server):
        assert time.monotonic() < deadline, "a disconnected client uses no memory"
        time.sleep(0.1)


def _resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _sending(server: Server) -> list[str]:
    return [name for name in open_files(server.process.pid) if name.startswith(str(server.root / "files"))]


def _ask(path: Path, *, cut_to: int | None = None) -> tuple[list[int], bytes]:
    """Sizes of the pieces and all bytes of a GET without a server; `cut_to`: truncate the file after the first piece."""
    pieces: list[bytes] = []

    async def receive() -> Message:
        await asyncio.sleep(3600)
        raise AssertionError

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            pieces.append(message["body"])
            if cut_to is not None and len(pieces) == 1:
                os.truncate(path, cut_to)

    answer = FileAnswer(path, Downloads(), stat_result=path.stat())
    asyncio.run(answer({"type": "http", "method": "GET", "headers": []}, receive, send))
    return [len(piece) for piece in pieces], b"".join(pieces)


def test_pieces_get_smaller_with_the_number_of_downloads() -> None:
    downloads, pieces = Downloads(), []
    with ExitStack() as stack:
        for _ in range(10_000):
            stack.enter_context(downloads.count_one())
            pieces.append(downloads.piece)
    assert pieces[:16] == [PIECE] * 16
    assert sum(pieces) < 256 << 20
    assert min(pieces) >= 16 << 10
    assert all(size % 4096 == 0 for size in pieces)
    assert downloads.piece == PIECE, "and back"


@pytest.mark.parametrize("size", [0, 1, PIECE, PIECE + 1, WINDOW + PIECE + 7])
@pytest.mark.parametrize("cached", [True, False])
def test_every_size_from_memory_and_from_a_slow_disk(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, size: int, cached: bool
) -> None:
    path = tmp_path / "file"
    content = os.urandom(size)
    path.write_bytes(content)
    in_thread = []
    real = asyncio.BaseEventLoop.run_in_executor
    monkeypatch.setattr(asyncio.BaseEventLoop, "run_in_executor", lambda *given: in_thread.append(given[2]) or real(*given))
    if not cached:
        monkeypatch.setattr(download, "is_cached", lambda *_: False)
    sizes, got = _ask(path)
    assert got == content
    assert max(sizes) <= PIECE
    # Just written, so the kernel has it in memory. An empty file has no byte to check.
    assert bool(in_thread) == (not cached or size == 0)


def test_a_file_that_becomes_shorter_ends_the_answer_with_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(3 * PIECE))
    with pytest.raises(OSError, match="shorter"):
        _ask(path, cut_to=PIECE + 5)


def test_the_kernel_says_what_it_has_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(WINDOW))
    file = os.open(path, os.O_RDONLY)
    try:
        assert download.is_cached(file, WINDOW - 1)
        assert not download.is_cached(file, WINDOW)
    finally:
        os.close(file)
