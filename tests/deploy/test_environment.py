"""Environments: built by hash from an index on this machine, proven on every node, switched, rolled back, collected."""

from __future__ import annotations

import asyncio
import base64
import functools
import hashlib
import io
import threading
import zipfile
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from deploy.steps import environment as step
from deploy.steps.environment import Matrix, Module
from gracefarm import settings
from gracefarm.console import Console
from gracefarm.errors import DigestError, HostError, InstallError
from tests.deploy import kit


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def index(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A simple index: a folder with a page, served."""
    folder = tmp_path / "index" / "tiny"
    folder.mkdir(parents=True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder.parent)))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    thread.join()
    server.server_close()


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
    links = "".join(f'<a href="{one.name}">{one.name}</a>' for one in sorted(folder.glob("*.whl")))
    (folder / "index.html").write_text(f"<html><body>{links}</body></html>")
    return f"tiny=={version} --hash=sha256:{hashlib.sha256(target.getvalue()).hexdigest()}\n"


def test_built_once_proven_switched_rolled_back_collected(
    tmp_path: Path, index: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, url = index
    monkeypatch.setattr(step, "matrix", lambda _engine: Matrix(modules=(Module(module="tiny"),), commands=(("python", "-V"),)))
    root, console, here = tmp_path / "share", Console(), settings.load()

    def spec(lock: str) -> step.Spec:
        return step.Spec(root=str(root), lock=lock, index=url, engine="tiny")

    async def go() -> None:
        async with kit.nodes(tmp_path, 2) as nodes:
            one, two = publish(folder, "1.0", "x = 1\n"), publish(folder, "2.0", "x = 2\n")
            made = await asyncio.gather(*(step.up(nodes, spec(one), here, console) for _ in range(2)))
            assert sorted(each.built for each in made) == [False, True]  # two people at once: one builds
            assert set(made[0].rows) == {"k0", "k1"}
            again = await step.up(nodes, spec("# a comment\n" + one), here, console)
            assert (again.id, again.built, again.switched) == (made[0].id, False, False)
            second = await step.up(nodes, spec(two), here, console)
            assert (root / "env").resolve().name == second.id
            with pytest.raises(DigestError, match="another file than the lock names"):
                await step.up(nodes, spec("tiny==1.0 --hash=sha256:" + "0" * 64), here, console)
            broken = publish(folder, "3.0", "import nothing_there\n")
            with pytest.raises(InstallError, match="k0: tiny: ModuleNotFoundError"):
                await step.up(nodes, spec(broken), here, console)
            assert (root / "env").resolve().name == second.id  # what is broken never becomes active
            assert (await step.rollback(nodes, str(root)))["active"] == made[0].id
            assert (root / "env").resolve().name == made[0].id
            with pytest.raises(HostError, match="no earlier environment"):
                await step.rollback(nodes, str(root))
            gone = await step.collect(nodes, str(root), keep=2, grace=0)
            assert len(gone["removed"]) == 1
            assert {each["id"] for each in (await step.listing(nodes, str(root)))["environments"]} == {made[0].id, second.id}

    asyncio.run(go())
