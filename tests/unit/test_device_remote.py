"""The store of device code with a shared cache: the client in the sandbox against the builder's socket server."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from builder.compiling import ccache_socket
from builder.compiling.ccache_socket import serving
from builder.data.toolchain import device_store
from builder.data.toolchain.device_store import Result, get, packed, put
from builder.toolchains.ccache import SOCKET
from tests.unit.test_farm import Entries

KEY = "ab" * 32
RESULT = Result(out=b"out", err=b"warning", files={"ptx": b"code", "nvvm": b""}, cost={"cpu_s": 1.5})


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The socket of a machine whose store is empty."""
    monkeypatch.setenv("GRACEFARM_DEVICE_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("GRACEFARM_DEVICE_SOCKET", str(tmp_path / SOCKET))
    return tmp_path / SOCKET


def off(place: Path) -> bool:
    """Whether the passes that follow do not use the socket."""
    return place.with_name(f"{SOCKET}.off").exists()


def local(tmp_path: Path) -> Path:
    return tmp_path / "store" / KEY[:2] / KEY


def test_client_and_server_agree(tmp_path: Path) -> None:
    assert (device_store.GREETING, device_store.LARGEST) == (ccache_socket.GREETING, ccache_socket.LARGEST)


def test_a_second_machine_gets_the_result_and_keeps_it(tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = Entries()
    with serving(tmp_path, entries):
        put(KEY, RESULT)
        assert entries.kept == {("device", KEY): local(tmp_path).read_bytes()}
        monkeypatch.setenv("GRACEFARM_DEVICE_STORE", str(tmp_path / "second"))
        assert get("cd" * 32) is None
        assert get(KEY) == RESULT
        entries.kept.clear()
        assert get(KEY) == RESULT
    assert get(KEY) == RESULT
    assert (tmp_path / "second" / KEY[:2] / KEY).read_bytes() == local(tmp_path).read_bytes()
    assert not off(place)


def test_a_damaged_local_file_is_replaced(tmp_path: Path, place: Path) -> None:
    with serving(tmp_path, Entries()):
        put(KEY, RESULT)
        content = local(tmp_path).read_bytes()
        local(tmp_path).write_bytes(content[:-1])
        assert get(KEY) == RESULT
        assert local(tmp_path).read_bytes() == content
    assert not off(place)


def test_without_a_store_nothing_is_requested(tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = Entries()
    entries.kept["device", KEY] = packed(RESULT)
    monkeypatch.setenv("GRACEFARM_DEVICE_STORE", "")
    with serving(tmp_path, entries):
        assert get(KEY) is None
        put("cd" * 32, RESULT)
    assert list(entries.kept) == [("device", KEY)]
    assert not off(place)


def test_a_large_entry_stays_local(tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_store, "LARGEST", len(packed(RESULT)) - 1)
    entries = Entries()
    with serving(tmp_path, entries):
        put(KEY, RESULT)
    assert entries.kept == {}
    assert get(KEY) == RESULT
    assert not off(place)


def test_a_full_disk_does_not_lose_the_answer(tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("GRACEFARM_DEVICE_STORE", str(tmp_path / "file"))
    with serving(tmp_path, Entries()):
        put(KEY, RESULT)
        assert get(KEY) == RESULT
    assert not off(place)


@pytest.mark.parametrize(
    "content",
    [b"", b"short", packed(RESULT)[:-1], packed(RESULT)[1:], packed(Result(cost=["no table"])), packed(Result(cost=3))],  # type: ignore[arg-type]
)
def test_damaged_entries_are_misses_and_are_not_kept(tmp_path: Path, place: Path, content: bytes) -> None:
    entries = Entries()
    entries.kept["device", KEY] = content
    with serving(tmp_path, entries):
        assert get(KEY) is None
    assert not local(tmp_path).exists()


@contextmanager
def answering(place: Path, *parts: bytes, pause_s: float = 0) -> Iterator[list[int]]:
    """A server that sends parts, whatever it receives, with a pause after each; the list counts its connections."""
    ended, connections = threading.Event(), list[int]()

    def serve() -> None:
        while True:
            connection, _ = server.accept()
            with connection:
                if ended.is_set():
                    return
                connections.append(1)
                try:
                    for part in parts:
                        connection.sendall(part)
                        ended.wait(pause_s)
                except OSError:
                    continue

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(place))
        server.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield connections
        finally:
            ended.set()
            with socket.socket(socket.AF_UNIX) as last:
                last.connect(str(place))
            thread.join()


OK = device_store.GREETING + b"\x00"


@pytest.mark.parametrize(
    ("parts", "pause_s"),
    [
        ([b"\x02\x01\x00"], 0),  # a different version
        ([b"\x01"], 0),  # ends in the greeting
        ([device_store.GREETING, b"\x07"], 0),  # an unknown status
        ([OK + struct.pack("=Q", 100) + b"half"], 0),
        ([OK + struct.pack("=Q", 1 << 62)], 0),  # larger than the memory
        ([b""], 60),  # sends nothing
        ([OK, struct.pack("=Q", 100), *[b"x"] * 90], 0.1),  # sends a byte from time to time
    ],
)
def test_a_lying_or_slow_socket_is_used_once(
    tmp_path: Path, place: Path, parts: list[bytes], pause_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_store, "PATIENCE", 0.5)
    with answering(place, *parts, pause_s=pause_s) as connections:
        started = time.monotonic()
        assert get(KEY) is None
        assert off(place)
        put(KEY, RESULT)
        assert get("cd" * 32) is None
        assert time.monotonic() - started < 3
        assert connections == [1]
    assert get(KEY) == RESULT


def test_a_socket_that_does_not_read_delays_a_large_entry_by_the_patience(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_store, "PATIENCE", 0.5)
    monkeypatch.setattr(device_store, "packed", lambda _: bytes(8 << 20))
    with answering(place, device_store.GREETING, b"", pause_s=60):
        started = time.monotonic()
        put(KEY, RESULT)
        assert time.monotonic() - started < 3
    assert off(place)
    assert len(local(tmp_path).read_bytes()) == 8 << 20


@pytest.mark.parametrize("dead", [True, False])
def test_a_missing_or_dead_socket_changes_nothing(tmp_path: Path, place: Path, dead: bool) -> None:
    if dead:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(place))
    assert get(KEY) is None
    assert off(place)
    put(KEY, RESULT)
    assert get(KEY) == RESULT


def test_many_passes_at_once_are_served(tmp_path: Path, place: Path) -> None:
    """The queue of the socket holds more connections than a machine has cores."""
    slow = threading.Event()

    class Slow(Entries):
        def get(self, kind: str, key: str) -> bytes | None:
            slow.wait(0.2)
            return super().get(kind, key)

    entries = Slow()
    entries.kept["device", KEY] = packed(RESULT)
    with serving(tmp_path, entries):
        threads = [threading.Thread(target=device_store.request, args=(b"\x00", KEY)) for _ in range(100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not off(place)
