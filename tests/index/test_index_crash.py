"""Kills at random moments, also with a full disk: every listed file is correct, and no confirmed file is lost.

The suite kills a few dozen uploads. For a thousand: GRACEFARM_KILLS=1000 python -m pytest tests/index/test_index_crash.py
"""

from __future__ import annotations

import base64
import hashlib
import os
import random
import signal
import socket
import subprocess
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from index_kit import JSON, Server, await_url, make_token, run_json, serving, start, stop, wheel

KILLS = int(os.environ.get("GRACEFARM_KILLS", "24"))
UPLOADERS = 8
"Uploads in flight at each kill."


class Uploader(threading.Thread):
    """Uploads unique files one after the other, records which were confirmed, and repeats the others."""

    def __init__(self, number: int, token: str, seed: int, sizes: tuple[int, ...] = (100, 20_000, 400_000, 3_000_000)) -> None:
        super().__init__()
        self.sizes = sizes
        self.number, self.token = number, token
        self.random = random.Random(seed)
        # A new connection for each upload: a reused connection that a kill interrupted would count as an open upload.
        self.client = httpx.Client(timeout=20, limits=httpx.Limits(max_keepalive_connections=0))
        self.confirmed: dict[str, str] = {}
        self.pending: tuple[str, bytes] | None = None
        self.count = 0
        self.refusals: list[str] = []
        self.cut = 0
        self.url = ""
        self.go = threading.Event()
        self.end = threading.Event()

    def run(self) -> None:
        while not self.end.is_set():
            if self.pending is None:  # created before the next round, so that the server is busy when it is killed
                self.count += 1
                files = {"crash/data": os.urandom(self.random.choice(self.sizes))}
                self.pending = wheel(f"crash{self.number}", f"1.{self.count}", files=files, compress=zipfile.ZIP_STORED)
            if self.go.wait(0.05):
                self._send(*self.pending)
        self.client.close()

    def _send(self, name: str, content: bytes) -> None:
        try:
            answer = self.client.post(
                self.url + "/legacy/",
                data={":action": "file_upload", "sha256_digest": hashlib.sha256(content).hexdigest()},
                files={"content": (name, content)},
                auth=("__token__", self.token),
            )
        except httpx.ConnectError:
            time.sleep(0.02)
            return
        except httpx.HTTPError:
            self.cut += 1  # the upload was open: the server accepted the connection and never answered
            return
        if answer.status_code == 200:
            self.confirmed[name] = hashlib.sha256(content).hexdigest()
            self.pending = None
        elif answer.status_code == 507:
            self.refusals.append(answer.text)
            time.sleep(0.02)
        else:
            raise AssertionError(answer.text)


def kill(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def listed(url: str) -> dict[str, tuple[str, str]]:
    """File name to digest and address, from every page."""
    with httpx.Client(base_url=url, headers={"Accept": JSON}, timeout=60) as client:
        digests = {}
        for project in client.get("/simple/").json()["projects"]:
            for item in client.get(f"/simple/{project['name']}/").json()["files"]:
                digests[item["filename"]] = (item["hashes"]["sha256"], f"/simple/{project['name']}/{item['url']}")
        return digests


def check(root: Path, url: str, confirmed: dict[str, str], seen: set[str]) -> None:
    digests = listed(url)
    assert confirmed.items() <= {name: digest for name, (digest, _) in digests.items()}.items(), "a confirmed file is lost"
    with httpx.Client(base_url=url, timeout=60) as client:
        for name in digests.keys() - seen:
            digest, address = digests[name]
            assert hashlib.sha256(client.get(address).content).hexdigest() == digest, f"{name} is listed with wrong content"
            seen.add(name)


def test_killed_at_random_moments(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    token = make_token(root)
    chance = random.Random(KILLS)
    uploaders = [Uploader(number, token, number) for number in range(UPLOADERS)]
    for uploader in uploaders:
        uploader.start()
    process, seen = start(root, "--allow-new"), set[str]()
    try:
        kills = 0
        while sum(uploader.cut for uploader in uploaders) < KILLS:
            kills += 2
            assert kills < KILLS + 100, "too few uploads were open at a kill, so the test proves nothing"
            url = await_url(process)
            for uploader in uploaders:
                uploader.url = url
                uploader.go.set()
            time.sleep(chance.uniform(0.01, 0.2))
            kill(process)
            for uploader in uploaders:
                uploader.go.clear()
            process = start(root, "--allow-new")
            url = await_url(process)
            assert not list((root / "staging").iterdir()), "the start cleans staging"
            check(root, url, {k: v for uploader in uploaders for k, v in uploader.confirmed.items()}, seen)
            kill(process)
            process = start(root, "--allow-new")
        url = await_url(process)
        for uploader in uploaders:
            uploader.url = url
            uploader.go.set()
        goal = sum(len(uploader.confirmed) for uploader in uploaders) + UPLOADERS
        for _ in range(400):
            if sum(len(uploader.confirmed) for uploader in uploaders) >= goal:
                break
            time.sleep(0.05)
        else:
            raise AssertionError("what was cut off cannot be uploaded again")
    finally:
        for uploader in uploaders:
            uploader.end.set()
        for uploader in uploaders:
            uploader.join()
        stop(process)
    assert run_json(root, "fsck")["damaged"] == []
    report("random moments", kills, uploaders, seen)


def report(what: str, kills: int, uploaders: list[Uploader], seen: set[str]) -> None:
    """Print the figures of the run, for docs/explanation/benchmarks.md: pytest -rP shows them."""
    cut, refused = sum(uploader.cut for uploader in uploaders), sum(len(uploader.refusals) for uploader in uploaders)
    confirmed = sum(len(uploader.confirmed) for uploader in uploaders)
    print(
        f"{what}: {kills} kills, {cut} uploads cut off, {refused} refused for want of space, {confirmed} confirmed,"
        f" {len(seen)} listed and rehashed after a kill, 0 with another hash, 0 confirmed lost"
    )


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.1, 0.9, 1.0])
def test_killed_during_an_upload_of_400_mib(tmp_path: Path, share: float) -> None:
    """A kill after a part of the upload, or during its checks: nothing of it remains, and a repeated upload succeeds."""
    root = tmp_path / "root"
    root.mkdir()
    token = make_token(root)
    name, content = wheel("huge_pkg", files={"huge_pkg/data": os.urandom(1 << 20) * 400}, compress=zipfile.ZIP_STORED)
    process = start(root, "--allow-new")
    try:
        url = await_url(process)
        secret = base64.b64encode(f"__token__:{token}".encode()).decode()
        form = b'--b\r\nContent-Disposition: form-data; name=":action"\r\n\r\nfile_upload\r\n'
        form += b'--b\r\nContent-Disposition: form-data; name="content"; filename="%s"\r\n\r\n' % name.encode()
        tail = b"\r\n--b--\r\n"
        head = f"POST /legacy/ HTTP/1.1\r\nHost: x\r\nAuthorization: Basic {secret}\r\n"
        head += (
            f"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: {len(form) + len(content) + len(tail)}\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
            connection.sendall(head.encode() + form)
            connection.sendall(memoryview(content)[: int(len(content) * share)])
            if share == 1.0:
                connection.sendall(tail)
                time.sleep(0.2)
            kill(process)
        process = start(root, "--allow-new")
        url = await_url(process)
        assert not list((root / "staging").iterdir())
        digests = listed(url)
        if digests:  # at 1.0 the kill may come after the commit; then the file is complete
            assert share == 1.0
        with httpx.Client(base_url=url, timeout=120) as client:
            answer = client.post(
                "/legacy/", data={":action": "file_upload"}, files={"content": (name, content)}, auth=("__token__", token)
            )
            assert answer.status_code == 200, answer.text
            assert hashlib.sha256(client.get(listed(url)[name][1]).content).digest() == hashlib.sha256(content).digest()
        assert run_json(root, "fsck")["damaged"] == []
    finally:
        kill(process)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 64 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.root
def test_a_full_disk_refuses_and_loses_nothing(small_disk: Path) -> None:
    with serving(small_disk / "root", "--allow-new") as server:
        confirmed: dict[str, str] = {}
        for number in range(40):
            name, content = wheel(
                "full_pkg", f"1.{number}", files={"full/data": os.urandom(2 << 20)}, compress=zipfile.ZIP_STORED
            )
            answer = server.upload(name, content)
            if answer.status_code != 200:
                break
            confirmed[name] = hashlib.sha256(content).hexdigest()
        assert answer.status_code == 507, answer.text
        assert "full" in answer.text or "space" in answer.text
        assert len(confirmed) >= 5
        assert server.page("full-pkg").status_code == 200, "reads still work"
        assert set(server.filenames("full-pkg")) == set(confirmed)
        assert not list((server.root / "staging").iterdir())
        check(server.root, server.url, confirmed, set())


@pytest.mark.root
def test_a_disk_that_fills_up_under_an_upload(small_disk: Path) -> None:
    """The announced length fits, but another process uses the space in the meantime."""
    with serving(small_disk / "root", "--allow-new") as server:
        assert server.upload(*wheel("first_pkg")).status_code == 200
        name, content = wheel("late_pkg", files={"late/data": os.urandom(8 << 20)}, compress=zipfile.ZIP_STORED)
        body = (
            b'--b\r\nContent-Disposition: form-data; name=":action"\r\n\r\nfile_upload\r\n--b\r\n'
            b'Content-Disposition: form-data; name="content"; filename="'
            + name.encode()
            + b'"\r\n\r\n'
            + content
            + b"\r\n--b--\r\n"
        )

        def parts() -> Iterator[bytes]:
            yield body[: 2 << 20]
            time.sleep(0.5)
            # Unbuffered: closing a buffered file would fail again.
            with (small_disk / "ballast").open("wb", buffering=0) as ballast, suppress(OSError):
                while ballast.write(bytes(1 << 16)):
                    pass
            for begin in range(2 << 20, len(body), 1 << 18):
                yield body[begin : begin + (1 << 18)]

        answer = server.client.post(
            "/legacy/",
            content=parts(),
            headers={"Content-Type": "multipart/form-data; boundary=b"},
            auth=("__token__", server.token),
        )
        assert answer.status_code == 507, answer.text
        assert server.filenames("late-pkg") == []
        assert server.filenames("first-pkg")
        assert not list((server.root / "staging").iterdir())
        (small_disk / "ballast").unlink()
        assert server.upload(name, content).status_code == 200


class Ballast(threading.Thread):
    """Another process that fills the disk to the last byte while uploads are open, and frees it again."""

    def __init__(self, path: Path, chance: random.Random) -> None:
        super().__init__()
        self.path, self.chance = path, chance
        self.end = threading.Event()
        self.times_full = 0

    def run(self) -> None:
        while not self.end.wait(self.chance.uniform(0.01, 0.1)):
            try:
                with self.path.open("ab", buffering=0) as stream:
                    while True:
                        stream.write(bytes(1 << 18))
            except OSError:
                self.times_full += 1
            self.end.wait(self.chance.uniform(0.01, 0.2))
            os.truncate(self.path, 0)


@pytest.mark.root
def test_killed_with_a_full_disk(small_disk: Path) -> None:
    root = small_disk / "root"
    root.mkdir()
    token = make_token(root)
    uploaders = [Uploader(number, token, 100 + number, sizes=(100, 5_000, 60_000)) for number in range(UPLOADERS)]
    for uploader in uploaders:
        uploader.start()
    process, seen, chance = start(root, "--allow-new"), set[str](), random.Random(7)
    times_full = kills = 0
    try:
        while sum(uploader.cut for uploader in uploaders) < KILLS // 4 or not any(uploader.refusals for uploader in uploaders):
            kills += 2
            assert kills < KILLS + 100, "too few uploads were open at a kill, so the test proves nothing"
            url = await_url(process)
            ballast = Ballast(small_disk / "ballast", chance)
            ballast.start()
            for uploader in uploaders:
                uploader.url = url
                uploader.go.set()
            time.sleep(chance.uniform(0.02, 0.5))
            kill(process)
            for uploader in uploaders:
                uploader.go.clear()
            ballast.end.set()
            ballast.join()
            times_full += ballast.times_full
            process = start(root, "--allow-new")
            url = await_url(process)
            confirmed = {k: v for uploader in uploaders for k, v in uploader.confirmed.items()}
            check(root, url, confirmed, seen)
            kill(process)
            process = start(root, "--allow-new")
        await_url(process)
    finally:
        for uploader in uploaders:
            uploader.end.set()
        for uploader in uploaders:
            uploader.join()
        stop(process)
    assert times_full
    assert any(uploader.confirmed for uploader in uploaders), "no upload was confirmed, so the test proves nothing"
    assert run_json(root, "fsck")["damaged"] == []
    report("full disk", kills, uploaders, seen)
    print(f"the disk was filled {times_full} times")


def test_a_killed_server_does_not_keep_the_next_from_starting(tmp_path: Path) -> None:
    """The lock of the server ends with its process."""
    process = start(tmp_path / "root")
    await_url(process)
    kill(process)
    with serving(tmp_path / "root") as server:
        assert isinstance(server, Server)
