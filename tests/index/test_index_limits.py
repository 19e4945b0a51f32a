"""Clients that stop halfway, stall or send too much: the index ends their connections and continues to serve others."""

from __future__ import annotations

import base64
import hashlib
import signal
import socket
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from index_kit import Server, nothing_stored, refused, serving, wheel

from index.serving.server import GRACE
from tests.processes import open_files


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
