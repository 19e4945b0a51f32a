"""Shared code of the index tests: tiny real wheels, a real server process, and the form of the legacy upload API."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import httpx
from platformdirs import user_cache_path

from index.cli import main

REPOSITORY = Path(__file__).resolve().parents[2]
JSON = "application/vnd.pypi.simple.v1+json"
AARCH64 = "cp311-cp311-manylinux_2_34_aarch64"
UV = [sys.executable, "-m", "uv"]


def tool(*packages: str, python: str = sys.executable) -> Path:
    """The bin folder of an environment with these packages, created once and cached."""
    name = hashlib.sha256(" ".join((*packages, python)).encode()).hexdigest()[:16]
    folder = user_cache_path("gracefarm") / "test-tools" / name
    if not (folder / "ready").exists():
        subprocess.run([*UV, "venv", "--quiet", "--allow-existing", "--python", python, str(folder)], check=True)
        subprocess.run([*UV, "pip", "install", "--quiet", "--python", str(folder / "bin" / "python"), *packages], check=True)
        (folder / "ready").touch()
    return folder / "bin"


def metadata(name: str, version: str, *, requires: tuple[str, ...] = (), requires_python: str | None = ">=3.8") -> bytes:
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", "Summary: a test's wheel"]
    lines += [f"Requires-Python: {requires_python}"] if requires_python else []
    lines += [f"Requires-Dist: {item}" for item in requires]
    return ("\n".join(lines) + "\n\nA description.\n").encode()


def record_line(name: str, content: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return f"{name},sha256={digest},{len(content)}"


def wheel(
    name: str = "demo_pkg",
    version: str = "1.0",
    tags: str = "py3-none-any",
    *,
    files: dict[str, bytes] | None = None,
    requires: tuple[str, ...] = (),
    requires_python: str | None = ">=3.8",
    meta: bytes | None = None,
    dist_info: str | None = None,
    record: str | None = None,
    wheel_tags: str | None = None,
    wheel_file: bytes | None = None,
    without: str = "",
    compress: int = zipfile.ZIP_DEFLATED,
) -> tuple[str, bytes]:
    """File name and bytes of a wheel. It is valid unless an argument makes it invalid.

    `wheel_file` is the content of WHEEL; `without` names a file that .dist-info lacks.
    """
    folder = dist_info or f"{name}-{version}.dist-info"
    module = name.replace("-", "_")
    content = {f"{module}/__init__.py": f'VERSION = "{version}"\n'.encode()} if files is None else dict(files)
    content[f"{folder}/METADATA"] = (
        meta if meta is not None else metadata(name, version, requires=requires, requires_python=requires_python)
    )
    python, abi, platforms = (wheel_tags or tags).split("-")
    each = [
        f"Tag: {interpreter}-{binary}-{platform}"
        for interpreter in python.split(".")
        for binary in abi.split(".")
        for platform in platforms.split(".")
    ]
    content[f"{folder}/WHEEL"] = (
        "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\n" + "\n".join(each) + "\n"
    ).encode()
    if wheel_file is not None:
        content[f"{folder}/WHEEL"] = wheel_file
    content.pop(f"{folder}/{without}", None)
    listing = "\n".join([*(record_line(key, value) for key, value in content.items()), f"{folder}/RECORD,,"]) + "\n"
    content[f"{folder}/RECORD"] = (listing if record is None else record).encode(errors="surrogateescape")
    content.pop(f"{folder}/{without}", None)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compress) as archive:
        for key, value in content.items():
            archive.writestr(zipfile.ZipInfo(key, (2024, 1, 1, 0, 0, 0)), value, compress)
    return f"{name}-{version}-{tags}.whl", buffer.getvalue()


def sdist(
    name: str = "demo_pkg",
    version: str = "1.0",
    *,
    extra: dict[str, bytes] | None = None,
    meta: bytes | None = None,
    without: str = "",
) -> tuple[str, bytes]:
    folder = f"{name}-{version}"
    members = {
        f"{folder}/PKG-INFO": metadata(name, version) if meta is None else meta,
        f"{folder}/pyproject.toml": b"",
        **(extra or {}),
    }
    members.pop(f"{folder}/{without}", None)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for path, content in members.items():
            info = tarfile.TarInfo(path)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return f"{name}-{version}.tar.gz", buffer.getvalue()


def run_index(
    root: Path, *arguments: str, check: bool = True, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `index …` on that root in this process, since the tests run it a hundred times."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with (
        mock.patch.object(sys, "argv", ["index", *arguments, "--root", str(root)]),
        mock.patch.dict(os.environ, env or {}),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    result = subprocess.CompletedProcess(["index", *arguments], code, out.getvalue(), err.getvalue())
    assert not check or code == 0, result.stdout + result.stderr
    return result


def run_json(root: Path, *arguments: str, env: dict[str, str] | None = None) -> object:
    return json.loads(run_index(root, *arguments, "--json", env=env).stdout.strip().splitlines()[-1])


def make_token(root: Path, *arguments: str) -> str:
    token = run_json(root, "token", "create", "--name", "test", *arguments)
    assert isinstance(token, dict)
    return str(token["token"])


@dataclass(kw_only=True)
class Server:
    """A running `index serve`."""

    url: str
    root: Path
    token: str
    access_log: Path
    process: subprocess.Popen[str]
    client: httpx.Client = field(repr=False)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def upload(
        self,
        filename: str,
        content: bytes,
        *,
        path: str = "/legacy/",
        token: str | None = None,
        form: dict[str, str] | None = None,
    ) -> httpx.Response:
        """Upload a file like twine. `form` replaces fields of the form; the value None omits a field."""
        stem = filename.split("-")
        fields: dict[str, str] = {
            ":action": "file_upload",
            "protocol_version": "1",
            "name": stem[0],
            "version": stem[1].removesuffix(".tar.gz") if len(stem) > 1 else "",
            "filetype": "sdist" if filename.endswith(".tar.gz") else "bdist_wheel",
            "sha256_digest": hashlib.sha256(content).hexdigest(),
        }
        fields = {key: value for key, value in {**fields, **(form or {})}.items() if value is not None}
        return self.client.post(
            path,
            data=fields,
            files={"content": (filename, content, "application/octet-stream")},
            auth=("__token__", self.token if token is None else token),
        )

    def page(self, project: str, *, prefix: str = "", accept: str = JSON) -> httpx.Response:
        return self.client.get(f"{prefix}/simple/{project}/", headers={"Accept": accept})

    def filenames(self, project: str, *, prefix: str = "") -> list[str]:
        answer = self.page(project, prefix=prefix)
        return [] if answer.status_code == 404 else [item["filename"] for item in answer.json()["files"]]

    def requests(self) -> list[LogLine]:
        """The access log so far."""
        time.sleep(0.25)  # the server writes a batch every 0.1 s
        return [parse_line(line) for line in self.access_log.read_text().splitlines()]

    def forget(self) -> None:
        """Truncate the access log."""
        time.sleep(0.25)
        os.truncate(self.access_log, 0)


@dataclass(frozen=True, kw_only=True)
class LogLine:
    method: str
    target: str
    status: int
    size: int
    span: str
    agent: str


_LINE = re.compile(r'\S+ - - \[[^]]*\] "(\S+) (.*) HTTP" (\d+) (\d+) "([^"]*)" "(.*)" [0-9.]+\Z')


def parse_line(line: str) -> LogLine:
    match = _LINE.match(line)
    assert match, line
    return LogLine(method=match[1], target=match[2], status=int(match[3]), size=int(match[4]), span=match[5], agent=match[6])


@contextmanager
def serving(root: Path, *arguments: str, token: str | None = None) -> Iterator[Server]:
    """Start the index on a free port, and stop it."""
    root.mkdir(parents=True, exist_ok=True)
    secret = make_token(root) if token is None else token
    access_log = root.parent / f"{root.name}.access.log"
    process = start(root, "--access-log", str(access_log), *arguments)
    try:
        url = await_url(process)
        trust = "localhost" if url.startswith("http:") else str(root)
        with httpx.Client(base_url=url, timeout=60, verify=trust == "localhost") as client:
            yield Server(url=url, root=root, token=secret, access_log=access_log, process=process, client=client)
    finally:
        stop(process)
    errors = error_log(root).read_text()
    assert "Traceback" not in errors, errors[-4000:]


def start(root: Path, *arguments: str) -> subprocess.Popen[str]:
    with error_log(root).open("a") as errors:  # a file, since a full pipe would block the server
        return subprocess.Popen(
            [sys.executable, "-m", "index", "serve", "--root", str(root), "--port", "0", "--json", *arguments],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )


def error_log(root: Path) -> Path:
    """The server's stderr."""
    return root.parent / f"{root.name}.errors.log"


def await_url(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    try:
        return str(json.loads(line)["url"])
    except (ValueError, KeyError):
        process.kill()
        raise AssertionError(line + process.stdout.read()) from None


def stop(process: subprocess.Popen[str], number: int = signal.SIGTERM) -> None:
    if process.poll() is None:
        process.send_signal(number)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(20)
    if process.stdout is not None:
        process.stdout.close()


def preview_of(server: Server, name: str) -> str:
    sets = run_json(server.root, "stage", "list")
    return next(f"/preview/{item['preview']}" for item in sets if item["name"] == name)


def no_lock(server: Server, name: str, gone: str) -> None:
    """Check that there is no lock. A lock without project `gone` would install an incomplete set, perhaps without an error."""
    answer = server.client.get(f"/{name}/requirements.lock")
    assert answer.status_code == 404
    assert f"no longer has files of {gone}," in answer.text


def refused(answer: httpx.Response, *words: str, status: int = 400) -> None:
    assert answer.status_code == status, answer.text
    for word in words:
        assert word in answer.text


def nothing_stored(server: Server, project: str) -> None:
    assert server.page(project).status_code == 404
    assert not list((server.root / "staging").iterdir())
