"""Real servers on loopback for the fetch tests. They serve files with ranges and with faults, and git over HTTP."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx

from builder.planning.recipe import LoadedRecipe, Recipe, Smoke
from builder.planning.sources import File, FileSource, GitSource, SdistSource


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass
class Served:
    """One path of the server, with its faults."""

    data: bytes
    content_type: str = "application/octet-stream"
    etag: str = '"one"'
    ranges: bool = True
    breaks: list[int] = field(default_factory=list)
    "For each request: the number of bytes that are sent before the connection is closed."
    statuses: list[int] = field(default_factory=list)
    "For each request: the status that is sent instead of the file."
    gate: threading.Event | None = None
    "The server sends half of the bytes, and waits for this event before it sends the rest."
    half: threading.Event = field(default_factory=threading.Event)
    password: str = ""


@dataclass(frozen=True)
class Asked:
    """One request that the server got."""

    path: str
    range: str
    if_range: str
    status: int


class Server(ThreadingHTTPServer):
    """A server with its files, and the requests so far."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.served: dict[str, Served] = {}
        self.asked: list[Asked] = []
        self.repositories: Path | None = None
        self.git_protocol = True
        self.git_password = ""
        self.git_asked = threading.Event()
        self.git_gate: threading.Event | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore errors, since clients of some tests disconnect."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
        pass

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/git/"):
            self._git()
            return
        served = self.server.served.get(path)
        status, offset = self._decide(served)
        self.server.asked.append(Asked(path, self.headers.get("Range", ""), self.headers.get("If-Range", ""), status))
        self.send_response(status)
        if served is None or status not in (200, 206):
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = served.data[offset:]
        self.send_header("Content-Type", served.content_type)
        self.send_header("ETag", served.etag)
        self.send_header("Content-Length", str(len(data)))
        if status == 206:
            self.send_header("Content-Range", f"bytes {offset}-{len(served.data) - 1}/{len(served.data)}")
        self.end_headers()
        self._send(served, data)

    def _decide(self, served: Served | None) -> tuple[int, int]:
        if served is None:
            return 404, 0
        if served.password and self.headers.get("Authorization") != _basic(served.password):
            return 401, 0
        if served.statuses:
            return served.statuses.pop(0), 0
        asked = self.headers.get("Range", "")
        if not asked or not served.ranges or self.headers.get("If-Range", served.etag) != served.etag:
            return 200, 0
        offset = int(asked.removeprefix("bytes=").rstrip("-"))
        return (206, offset) if offset < len(served.data) else (416, 0)

    def _send(self, served: Served, data: bytes) -> None:
        if served.breaks:
            self.wfile.write(data[: served.breaks.pop(0)])
            self.wfile.flush()
            self.connection.close()
            return
        if served.gate is not None:
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            served.half.set()
            served.gate.wait(60)
            data = data[len(data) // 2 :]
        self.wfile.write(data)

    def do_POST(self) -> None:
        self._git()

    def _git(self) -> None:
        """Answer with git's http-backend, through CGI."""
        path, _, query = self.path.partition("?")
        self.server.git_asked.set()
        if self.server.git_gate is not None:
            self.server.git_gate.wait(60)
        if self.server.git_password and self.headers.get("Authorization") != _basic(self.server.git_password):
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="git"')
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        assert self.server.repositories is not None
        length = int(self.headers.get("Content-Length") or 0)
        environment = {
            "PATH": os.environ["PATH"],
            "GIT_PROJECT_ROOT": str(self.server.repositories),
            "GIT_HTTP_EXPORT_ALL": "1",
            "REQUEST_METHOD": self.command,
            "PATH_INFO": path.removeprefix("/git"),
            "QUERY_STRING": query,
            "CONTENT_TYPE": self.headers.get("Content-Type", ""),
            "CONTENT_LENGTH": str(length),
            "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
        }
        if self.server.git_protocol:
            environment["GIT_PROTOCOL"] = self.headers.get("Git-Protocol", "")
        done = subprocess.run(
            ["git", "http-backend"], input=self.rfile.read(length), env=environment, capture_output=True, check=False
        )
        head, _, body = done.stdout.partition(b"\r\n\r\n")
        fields = dict(line.split(": ", 1) for line in head.decode().split("\r\n"))
        self.send_response(int(fields.pop("Status", "200").split()[0]))
        for name, value in fields.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _basic(password: str) -> str:
    return "Basic " + base64.b64encode(f"user:{password}".encode()).decode()


@contextmanager
def running() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def tarball(files: dict[str, str], *, mtime: int = 1_700_000_000, mode: int = 0o644) -> bytes:
    """A .tar.gz of these files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.mode = len(text.encode()), mtime, mode
            tar.addfile(info, io.BytesIO(text.encode()))
    return buffer.getvalue()


def recipe(
    source: SdistSource | GitSource | FileSource, *, files: tuple[File, ...] = (), patches: tuple[Path, ...] = ()
) -> LoadedRecipe:
    data = Recipe(name="thing", version="1.0", license="MIT", source=source, files=files, smoke=Smoke(imports=("thing",)))
    return LoadedRecipe(folder=Path("recipes/thing"), data=data, patches=patches, smoke_script=None)


class Repository:
    """A git repository to fetch from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        self.git("init", "--quiet", "--initial-branch=main")

    def git(self, *arguments: str) -> str:
        """Run git as a fixed author, without the configuration of this machine."""
        who = {f"GIT_{role}_{what}": "a@example.org" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        when = {"GIT_AUTHOR_DATE": "1700000000 +0100", "GIT_COMMITTER_DATE": "1700000000 +0100"}
        alone = {"GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": os.devnull, "PATH": os.environ["PATH"]}
        allowed = ("-c", "protocol.file.allow=always")
        return subprocess.run(
            ["git", *allowed, *arguments],
            cwd=self.folder,
            env={**who, **when, **alone},
            check=True,
            text=True,
            capture_output=True,
        ).stdout.strip()

    def commit(self, files: dict[str, str]) -> str:
        for name, text in files.items():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_text(text)
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", "a change")
        return self.git("rev-parse", "HEAD")

    def tree(self, commit: str) -> str:
        return self.git("rev-parse", f"{commit}^{{tree}}")

    @property
    def url(self) -> str:
        return f"file://{self.folder}"

    def source(self, commit: str, **changes: object) -> GitSource:
        fields = {"kind": "git", "url": self.url, "commit": commit, "tree": self.tree(commit), **changes}
        return GitSource.model_validate(fields)


@contextmanager
def pypiserver(folder: Path, *options: str) -> Iterator[str]:
    """Run a different index. It has no records, and accepts uploads without a password."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "pypiserver", "run", "-i", "127.0.0.1", "-p", str(port), "-P", ".", "-a", ".", *options]
    with subprocess.Popen([*command, str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            deadline = time.monotonic() + 30
            while True:
                try:
                    httpx.get(f"http://127.0.0.1:{port}/")
                    break
                except httpx.TransportError:
                    assert time.monotonic() < deadline
                    time.sleep(0.1)
            yield f"http://127.0.0.1:{port}/"
        finally:
            server.terminate()
