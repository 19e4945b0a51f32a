"""An index that checks nothing, and real installers."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from test_index_clients import clean


@contextmanager
def careless_index(folder: Path, files: list[tuple[str, bytes]], *, serves_metadata: bool = True) -> Iterator[str]:
    """Serve a static index of these files with http.server, optionally with the PEP 658 metadata of the wheels."""
    for filename, content in files:
        project = folder / filename.split("-")[0].replace("_", "-")
        project.mkdir(parents=True, exist_ok=True)
        (project / filename).write_bytes(content)
        attribute = ""
        if serves_metadata and filename.endswith(".whl"):
            with zipfile.ZipFile(project / filename) as archive:
                meta = archive.read(next(name for name in archive.namelist() if name.endswith("/METADATA")))
            (project / f"{filename}.metadata").write_bytes(meta)
            attribute = f' data-core-metadata="sha256={hashlib.sha256(meta).hexdigest()}"'
        with (project / "index.html").open("a") as page:
            page.write(f'<a href="{filename}#sha256={hashlib.sha256(content).hexdigest()}"{attribute}>{filename}</a><br>\n')
    handler = partial(_Quiet, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Log nothing."""


def install(tool: str, url: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `pip install` or `uv pip install` into the folder, without caches."""
    pip = [sys.executable, "-m", "pip", "install", "--no-cache-dir", "--retries", "0", "--ignore-installed", "--index-url"]
    uv = [sys.executable, "-m", "uv", "pip", "install", "--no-cache", "--default-index"]
    return subprocess.run(
        [*(pip if tool == "pip" else uv), url, "--target", str(folder), *arguments],
        env=clean(), capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


def installed(folder: Path) -> list[str]:
    """The names of the .dist-info folders in a folder."""
    return sorted(path.name for path in folder.glob("*.dist-info"))
