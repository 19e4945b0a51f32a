"""Operation of the server: health, metrics, logs, TLS, start, end and memory."""

from __future__ import annotations

import asyncio
import base64
import re
import subprocess
import threading
from pathlib import Path

import httpx
import pytest
from index_kit import JSON, Server, run_index, serving, stop, wheel
from starlette.requests import Request
from starlette.responses import Response

from index.serving.assembly import build
from index.serving.service import ServeOptions
from index.store.files import Store
from index.web.projects import ProjectPages


def test_operation_pages(hosted: Server) -> None:
    assert hosted.client.get("/health").text == "ok\n"
    assert hosted.client.get("/ready").status_code == 200
    text = hosted.client.get("/metrics").text
    assert "gracefarm_index_requests_total" in text
    assert 'gracefarm_index_uploads_total{outcome="created"}' in text


def test_the_audit_log_is_append_only(hosted: Server) -> None:
    import sqlite3

    log = run_index(hosted.root, "log").stdout
    assert "file.upload" in log
    assert "token:test" in log
    database = sqlite3.connect(hosted.root / "catalogue" / "catalogue.db")
    for statement in ("DELETE FROM audit", "UPDATE audit SET actor = 'other'"):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            database.execute(statement)
    database.close()


def test_log_lines_cannot_be_forged(hosted: Server) -> None:
    headers = {"User-Agent": 'a" 200 "b', "Range": 'bytes=0-" 200 1 "x'}
    hosted.client.get("/simple/x%0a127.0.0.1 - - forged/", headers=headers)
    hosted.client.get("/health", headers={"User-Agent": "a\x85127.0.0.1 - - forged".encode("latin-1")})
    first, second = hosted.requests()[-2:]
    assert (first.status, first.span) == (404, "bytes=0-' 200 1 'x")
    assert (second.target, second.status) == ("/health", 200)


def test_tls(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", folder / "key.pem", "-out", folder / "cert.pem"],
        check=True, capture_output=True,
    )  # fmt: skip
    with serving(folder / "root", "--tls-cert", str(folder / "cert.pem"), "--tls-key", str(folder / "key.pem")) as server:
        import ssl

        context = ssl.create_default_context(cafile=folder / "cert.pem")
        assert httpx.get(server.url + "/health", verify=context).text == "ok\n"


def test_one_server_for_each_root(hosted: Server) -> None:
    process = run_index(hosted.root, "serve", "--port", "0", check=False)
    assert process.returncode == 4
    assert "another server already serves" in process.stderr


def test_the_server_ends_when_told(tmp_path_factory: pytest.TempPathFactory) -> None:
    with serving(tmp_path_factory.mktemp("end") / "root") as server:
        stop(server.process)
        assert server.process.returncode == 0


def test_bind_is_loopback_unless_told(hosted: Server) -> None:
    assert hosted.url.startswith("http://127.0.0.1:")
    header = base64.b64encode(b"x:y").decode()
    assert hosted.client.post("/legacy/", headers={"Authorization": f"Basic {header}"}).status_code == 401


def test_what_clients_send_does_not_fill_the_memory(shared: Server) -> None:
    """Responses are cached by page, media type and coding; other headers and queries add no entry."""
    name = wheel("memory_pkg")
    assert shared.upload(*name).status_code == 200

    def ask(count: int) -> None:
        for number in range(count):
            junk = f"{number:06}" + "x" * 30_000
            headers = {"Accept": f"{JSON}, x/{number}", "Accept-Encoding": f"gzip, x{number}", "If-None-Match": f'"{junk}"'}
            assert shared.client.get(f"/simple/memory-pkg/?x={number}", headers=headers).status_code == 200
            assert shared.client.get("/simple/memory-pkg/", headers=headers).status_code == 200

    ask(50)
    before = resident(shared)
    ask(1500)
    assert resident(shared) - before < 12 << 20


def resident(server: Server) -> int:
    """Bytes of the server's memory."""
    match = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{server.process.pid}/status").read_text())
    assert match
    return int(match[1]) << 10


def test_pages_of_the_whole_store_are_made_once_per_change_and_off_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    real = ProjectPages.first

    def counted(self: ProjectPages, request: Request) -> Response:
        threads.append(threading.current_thread().name)
        return real(self, request)

    monkeypatch.setattr(ProjectPages, "first", counted)
    application = build(Store(root=tmp_path / "root"), ServeOptions())

    async def ask() -> None:
        transport = httpx.ASGITransport(application)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            first = await client.get("/")
            for _ in range(3):
                assert (await client.get("/")).content == first.content
            assert (await client.get("/", headers={"If-None-Match": first.headers["etag"]})).status_code == 304
            assert len(threads) == 1
            assert "http://y" in (await client.get("/", headers={"Host": "y"})).text, "the address is that of the request"
            run_index(tmp_path / "root", "import", str(tmp_path / "wheels"))
            await asyncio.sleep(0.01)
            assert "fresh-pkg" in (await client.get("/")).text
            assert len(threads) == 3

    (tmp_path / "wheels").mkdir()
    name, content = wheel("fresh_pkg")
    (tmp_path / "wheels" / name).write_bytes(content)
    asyncio.run(ask())
    application.service.close()
    assert all(name.startswith("web_thread") for name in threads)
