"""Environments: built by hash from an index on this machine, proven on every node, switched, rolled back, collected."""

from __future__ import annotations

import asyncio
import base64
import functools
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from deploy.fleet.calls import call
from deploy.fleet.shells import remote_nodes
from deploy.remote.environment import interpreter
from deploy.remote.wire import WorkerError
from deploy.steps import environment, uv
from deploy.steps.environment import Built, EnvironmentSpec, Matrix, Module
from gracefarm import settings
from gracefarm.console import Console
from gracefarm.errors import DigestError, FetchError, HostError, InstallError
from tests.deploy import kit


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def served(folder: Path, handler: type[SimpleHTTPRequestHandler]) -> Iterator[str]:
    """A folder as a simple index."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def index(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A simple index: a folder with a page, served."""
    folder = tmp_path / "index" / "tiny"
    folder.mkdir(parents=True)
    with served(folder.parent, Quiet) as url:
        yield folder, url


def publish(folder: Path, version: str, body: str) -> str:
    """Put a wheel of `tiny` into the index; its line of the lock."""
    files = {
        "tiny.py": body,
        f"tiny-{version}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: tiny\nVersion: {version}\n",
        f"tiny-{version}.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    rows = [
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b'=').decode()},{len(text)}"
        for name, text in files.items()
    ]
    record = f"tiny-{version}.dist-info/RECORD"
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as zipped:
        for name, text in {**files, record: "\n".join([*rows, f"{record},,"]) + "\n"}.items():
            zipped.writestr(name, text)
    name = f"tiny-{version}-py3-none-any.whl"
    (folder / name).write_bytes(target.getvalue())
    links = "".join(f'<a href="{wheel.name}">{wheel.name}</a>' for wheel in sorted(folder.glob("*.whl")))
    (folder / "index.html").write_text(f"<html><body>{links}</body></html>")
    return f"tiny=={version} --hash=sha256:{hashlib.sha256(target.getvalue()).hexdigest()}\n"


def test_built_once_proven_switched_rolled_back_collected(
    tmp_path: Path, index: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, url = index
    monkeypatch.setattr(
        environment, "matrix", lambda _engine: Matrix(modules=(Module(module="tiny"),), commands=(("python", "-V"),))
    )
    root, console, here = tmp_path / "share", Console(), settings.load()

    def spec(lock: str) -> EnvironmentSpec:
        return EnvironmentSpec(root=str(root), lock=lock, index=url, engine="tiny")

    async def go() -> None:
        async with kit.nodes(tmp_path, 2) as nodes:
            one, two = publish(folder, "1.0", "x = 1\n"), publish(folder, "2.0", "x = 2\n")
            made = await asyncio.gather(*(environment.build_and_activate(nodes, spec(one), here, console) for _ in range(2)))
            assert sorted(each.built for each in made) == [False, True]  # two people at once: one builds
            assert set(made[0].rows) == {"k0", "k1"}
            again = await environment.build_and_activate(nodes, spec("# a comment\n" + one), here, console)
            assert (again.id, again.built, again.switched) == (made[0].id, False, False)
            second = await environment.build_and_activate(nodes, spec(two), here, console)
            assert (root / "env").resolve().name == second.id
            with pytest.raises(DigestError, match="the index has a different file than the lock pins"):
                await environment.build_and_activate(nodes, spec("tiny==1.0 --hash=sha256:" + "0" * 64), here, console)
            broken = publish(folder, "3.0", "import nothing_there\n")
            with pytest.raises(InstallError, match="k0: tiny: ModuleNotFoundError"):
                await environment.build_and_activate(nodes, spec(broken), here, console)
            assert (root / "env").resolve().name == second.id  # what is broken never becomes active
            assert (await call(nodes[0], "environment.roll_back", {"root": str(root), "link": "env"}))["active"] == made[0].id
            assert (root / "env").resolve().name == made[0].id
            with pytest.raises(HostError, match="no earlier environment"):
                await call(nodes[0], "environment.roll_back", {"root": str(root), "link": "env"})
            gone = await environment.collect(nodes, str(root), keep=2, grace=0)
            assert len(gone["removed"]) == 1
            assert {each["id"] for each in (await environment.listing(nodes, str(root)))["environments"]} == {
                made[0].id,
                second.id,
            }

    asyncio.run(go())


RELEASES = "https://github.com/astral-sh/python-build-standalone/releases/download"


def standalone(folder: Path, monkeypatch: pytest.MonkeyPatch, *, sha256: str | None = None) -> str:
    """A mirror of Python's releases with one archive: this machine's Python under the name and version that uv is asked for.

    The real archive is on GitHub, which not every machine reaches. uv knows its digest, so uv's list of downloads is replaced.
    """
    machine, version = os.uname().machine, str(uv.pinned()["python"])
    name = f"cpython-{version}+20260101-{machine}-unknown-linux-gnu-install_only_stripped.tar.gz"
    archive = folder / "20260101" / name
    archive.parent.mkdir(parents=True)

    def kept(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        skipped = ("/__pycache__", "/test", "/site-packages", "/dist-packages", "/config-")
        bad = any(part in member.name for part in skipped) or member.linkname.startswith("/")
        return None if bad else member

    base = Path(os.path.realpath("/usr/bin/python3.11"))
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        tar.add(base, "python/bin/python3.11")
        for link in ("python", "python3"):
            member = tarfile.TarInfo(f"python/bin/{link}")
            member.type, member.linkname = tarfile.SYMTYPE, "python3.11"
            tar.addfile(member)
        tar.add("/usr/lib/python3.11", "python/lib/python3.11", filter=kept)
    digest = sha256 or hashlib.sha256(archive.read_bytes()).hexdigest()
    major, minor, patch = map(int, version.split("."))
    listed = {
        "name": "cpython",
        "arch": {"family": machine, "variant": None},
        "os": "linux",
        "libc": "gnu",
        "variant": None,
        "major": major,
        "minor": minor,
        "patch": patch,
        "prerelease": "",
        "build": "20260101",
        "sha256": digest,
        "url": f"{RELEASES}/20260101/{name.replace('+', '%2B')}",
    }
    (folder / "downloads.json").write_text(json.dumps({f"cpython-{version}-linux-{machine}-gnu": listed}))
    monkeypatch.setenv("UV_PYTHON_DOWNLOADS_JSON_URL", str(folder / "downloads.json"))
    return f"file://{folder}"


stock = pytest.mark.skipif(
    not Path("/usr/lib/python3.11/os.py").is_file(), reason="no Python 3.11 of the distribution to pack"
)


@stock
@pytest.mark.slow
def test_a_managed_python_comes_onto_the_share_and_serves_every_environment(
    tmp_path: Path, index: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stock Ubuntu 22.04 or 24.04 has no python3.11: uv brings one, whose digest it knows, by way of a mirror."""
    folder, url = index
    mirror = standalone(tmp_path / "mirror", monkeypatch)
    monkeypatch.setattr(environment, "matrix", lambda _engine: Matrix(modules=(Module(module="tiny"), Module(module="ssl"))))
    root, here = tmp_path / "share", settings.load()

    def spec(lock: str, **more: object) -> EnvironmentSpec:
        values = {"root": str(root), "lock": lock, "index": url, "engine": "tiny", "source": "managed", "mirror": mirror}
        return EnvironmentSpec(**{**values, **more})  # type: ignore[arg-type]

    async def go() -> None:
        async with kit.nodes(tmp_path, 2) as nodes:
            lock = publish(folder, "1.0", "x = 1\n")
            made = await environment.build_and_activate(nodes, spec(lock), here, Console())
            assert made.switched
            base = (root / "env" / "bin" / "python").resolve()
            (place,) = (root / "python").iterdir()
            assert place.name == f"managed-{uv.pinned()['python']}-{os.uname().machine}"
            assert base.is_relative_to(place)
            described = json.loads((root / "env" / "environment.json").read_text())
            assert Path(described["interpreter"]) == base
            shutil.rmtree(tmp_path / "mirror" / "20260101")  # it is not asked again
            other = await environment.build_and_activate(nodes, spec(publish(folder, "2.0", "x = 2\n")), here, Console())
            assert other.built
            own = await environment.build_and_activate(nodes, spec(lock, source="system", mirror=None), here, Console())
            assert own.id != made.id  # the node's own Python makes another environment

    asyncio.run(go())


@stock
def test_a_python_that_is_another_than_uv_knows_or_cannot_be_had_is_told_with_a_way_out(
    tmp_path: Path, index: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, url = index
    lock, root, here = publish(folder, "1.0", "x = 1\n"), tmp_path / "share", settings.load()
    mirror = standalone(tmp_path / "mirror", monkeypatch, sha256="0" * 64)

    async def go() -> None:
        async with kit.nodes(tmp_path, 1) as nodes:
            spec = EnvironmentSpec(root=str(root), lock=lock, index=url, engine="tiny", source="managed", mirror=mirror)
            with pytest.raises(DigestError, match=r"k0: the mirror has a different file than uv pins: .*Hash mismatch"):
                await environment.build_and_activate(nodes, spec, here, Console())
            shutil.rmtree(tmp_path / "mirror" / "20260101")
            with pytest.raises(HostError, match=r"uv could not install Python: .*No such file") as error:
                await environment.build_and_activate(nodes, spec, here, Console())
            assert "`python_mirror` in deploy.toml" in error.value.remedy
            assert '`python = "system"`' in error.value.remedy
            assert not (root / "env").exists()

    asyncio.run(go())


def test_a_node_without_python_is_told_of_the_managed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for source in ("system", "conda"):
        with pytest.raises(WorkerError) as error:
            interpreter({"root": str(tmp_path), "python": {"source": source, "version": "3.11"}})
        assert '`python = "managed"` in deploy.toml' in error.value.remedy


def test_condas_python_is_made_by_conda_on_the_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for conda that makes what `conda create --prefix` makes, where its installer puts it, on no PATH."""
    conda = tmp_path / "home" / "miniforge3" / "bin" / "conda"
    conda.parent.mkdir(parents=True)
    python = os.path.realpath(sysconfig.get_config_var("BINDIR") + "/python3")
    text = '#!/bin/sh\n[ "$1 $2 $3" = "create --yes --prefix" ] && [ "$5" = python=3.11 ] || exit 9\n'
    conda.write_text(text + f'mkdir -p "$4/bin" && ln -s {python} "$4/bin/python3"\n')
    conda.chmod(0o755)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    request = {"root": str(tmp_path / "share"), "python": {"source": "conda", "version": "3.11"}}
    assert interpreter(request) == python
    assert (tmp_path / "share" / "python" / f"conda-3.11-{os.uname().machine}" / ".complete").is_file()


def test_a_cut_while_it_is_built_stops_no_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "matrix", lambda _engine: Matrix(modules=(Module(module="tiny"),)))
    folder = tmp_path / "index" / "tiny"
    folder.mkdir(parents=True)
    asked, cut = threading.Event(), threading.Event()

    class Waits(Quiet):
        def do_GET(self) -> None:
            if self.path.endswith(".whl"):
                asked.set()
                cut.wait(60)
            super().do_GET()

    async def go(url: str) -> Built:
        async with kit.machines(tmp_path, 1) as made, kit.fleet(tmp_path, made) as fleet:
            spec = EnvironmentSpec(
                root=str(tmp_path / "share"), lock=publish(folder, "1.0", "x = 1\n"), index=url, engine="tiny"
            )
            running = asyncio.ensure_future(
                environment.build_and_activate(remote_nodes(fleet), spec, settings.load(), Console())
            )
            assert await asyncio.to_thread(asked.wait, 60)
            before = made[0].entered
            made[0].cut()
            while made[0].entered == before:  # noqa: ASYNC110 - it is followed again
                await asyncio.sleep(0.05)
            cut.set()
            return await running

    with served(folder.parent, Waits) as url:
        assert asyncio.run(go(url)).built


def test_a_python_without_pip_is_told_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A virtual environment that uv made has no pip, by which uv for the nodes is fetched."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    here = settings.load().model_copy(update={"home": tmp_path / "home"})
    with pytest.raises(FetchError, match=r"No module named pip$") as error:
        uv.fetch_uv("0.0.1", "any", "0" * 64, here)
    assert error.value.remedy == f"install pip with `{tmp_path}/bare/bin/python -m ensurepip`"
