"""The servers that the benchmark of the index compares, and the wheels that they serve."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

HERE = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class Running:
    """A server under measurement."""

    name: str
    url: str
    pid: int
    started_s: float
    token: str = ""
    log: Path | None = None


def wheel(name: str, version: str, *, payload: bytes = b"", requires: str = "") -> tuple[str, bytes]:
    """File name and content of a small valid wheel. With `payload`, the wheel is large: it stores `payload` uncompressed."""
    folder = f"{name}-{version}.dist-info"
    meta = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n" + (f"Requires-Dist: {requires}\n" if requires else "")
    content = {
        f"{name}/__init__.py": b"",
        f"{name}/data.bin": payload,
        f"{folder}/METADATA": meta.encode(),
        f"{folder}/WHEEL": b"Wheel-Version: 1.0\nGenerator: bench\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    lines = [f"{key},sha256={_digest(value)},{len(value)}" for key, value in content.items()]
    content[f"{folder}/RECORD"] = ("\n".join([*lines, f"{folder}/RECORD,,"]) + "\n").encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for key, value in content.items():
            archive.writestr(zipfile.ZipInfo(key), value)
    return f"{name}-{version}-py3-none-any.whl", buffer.getvalue()


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def fill(folder: Path, count: int) -> None:
    """Write `count` small wheels into a folder. Each project has ten wheels."""
    folder.mkdir(parents=True)
    for number in range(count):
        name, content = wheel(f"pkg_{number // 10:05}", f"1.{number % 10}")
        (folder / name).write_bytes(content)


def run(*arguments: object, cwd: Path | None = None) -> str:
    """Run a command, and return its output. The command must succeed."""
    return subprocess.run([str(item) for item in arguments], check=True, capture_output=True, text=True, cwd=cwd).stdout


def index(root: Path, *arguments: object, checkout: Path = HERE) -> str:
    """Run `python -m index …` on a root. Python imports the package `index` from the working directory."""
    return run(sys.executable, "-m", "index", *arguments, "--root", root, cwd=checkout)


def free_port() -> int:
    """The number of a port that no process uses now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def process(
    name: str, command: list[object], url: str, ready: str, *, token: str = "", log: Path | None = None, cwd: Path = HERE
) -> Iterator[Running]:
    """Start a server, and measure the time until it answers a request for the path `ready`. Stop the server at the end."""
    begin = time.monotonic()
    child = subprocess.Popen(
        [str(item) for item in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, cwd=cwd
    )
    try:
        while True:
            try:
                if httpx.get(url + ready, timeout=60).status_code < 500:
                    break
            except httpx.HTTPError:
                if child.poll() is not None or time.monotonic() - begin > 120:
                    raise SystemExit(f"{name} did not start: {command}") from None
                time.sleep(0.005)
        yield Running(name=name, url=url, pid=child.pid, started_s=time.monotonic() - begin, token=token, log=log)
    finally:
        with suppress(ProcessLookupError):  # the server has ended already
            os.killpg(child.pid, signal.SIGTERM)
        try:
            child.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


@contextmanager
def ours(root: Path, *, token: str = "", checkout: Path = HERE) -> Iterator[Running]:
    """Run `index serve` as in production: with an access log, with variants and with a token.

    Without `token`, `index token create` opens the root first. With `token`, no process opens the root before the server.
    """
    root.mkdir(parents=True, exist_ok=True)
    token = token or json.loads(index(root, "token", "create", "--name", "bench", "--json", checkout=checkout))["token"]
    port, log = free_port(), root.parent / f"{root.name}.log"
    command = [sys.executable, "-m", "index", "serve", "--root", root, "--port", port, "--allow-new", "--variants"]
    command += ["--access-log", log]
    name, url = ("gracefarm" if checkout == HERE else "before"), f"http://127.0.0.1:{port}"
    with process(name, command, url, "/ready", token=token, log=log, cwd=checkout) as server:
        yield server


def own_environment(home: Path, *packages: str) -> Path:
    """The bin folder of a separate environment with these packages. Some of them conflict with gracefarm's packages."""
    if not home.exists():
        run(sys.executable, "-m", "uv", "venv", "--quiet", home)
        run(sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", home / "bin/python", *packages)
    return home / "bin"


@contextmanager
def pypiserver(folder: Path) -> Iterator[Running]:
    """Run pypiserver as in production: like our index, it allows reading without a login; uploads require a password."""
    home = folder.parent / "pypiserver-environment"
    # passlib does not work with bcrypt 5. So pypiserver does not start with bcrypt 5 and a password file.
    python = own_environment(home, "pypiserver[passlib]", "bcrypt<5") / "python"
    passwords = folder.parent / "pypiserver.htpasswd"
    passwords.write_text(f"__token__:{run('openssl', 'passwd', '-apr1', 'x').strip()}\n")
    port = free_port()
    options = ["-i", "127.0.0.1", "-p", port, "-P", passwords, "-a", "update", "--disable-fallback"]
    command = [python, "-m", "pypiserver", "run", *options, folder]
    with process("pypiserver", command, f"http://127.0.0.1:{port}", "/", token="x") as server:
        yield server


@contextmanager
def nginx(tree: Path, work: Path) -> Iterator[Running]:
    """Run nginx with one worker and an access log. It serves the exported tree of our index."""
    port = free_port()
    part = (tree / "nginx.conf").read_text().replace("__LISTEN__", f"127.0.0.1:{port}").replace("__ROOT__", str(tree))
    config = work / "nginx.conf"
    user = "user root;" if os.geteuid() == 0 else ""
    config.write_text(
        f"daemon off; {user} worker_processes 1; pid {work}/nginx.pid; error_log {work}/nginx.error;\n"
        f"events {{ worker_connections 1024; }} http {{ sendfile on; tcp_nopush on; access_log {work}/nginx.access;\n{part} }}"
    )
    command = ["nginx", "-c", config, "-e", work / "nginx.error"]
    with process("nginx", command, f"http://127.0.0.1:{port}", "/simple/") as server:
        yield server
