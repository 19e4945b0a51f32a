"""What `deploy serve` tells a person to type: it works as printed, and brings the key into no argument list."""

from __future__ import annotations

import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from deploy.cli.serve import curl_line

KEY = "gf-" + "k3y" * 10


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
@pytest.mark.parametrize("shell", ["bash", "sh"])
def test_the_hint_asks_with_the_key_and_no_process_has_it_in_its_arguments(tmp_path: Path, shell: str) -> None:
    told: list[str | None] = []
    seen: list[str] = []

    class Engine(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            told.append(self.headers["Authorization"])
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    seen.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
                except OSError:
                    continue
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_words: object) -> None:
            pass

    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("cat", "curl"):  # printf must be the shell's own
        (programs / name).symlink_to(str(shutil.which(name)))
    key = tmp_path / "a folder" / "api-key"
    key.parent.mkdir()
    key.write_text(KEY + "\n")
    with ThreadingHTTPServer(("127.0.0.1", 0), Engine) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            command = [str(shutil.which(shell)), "-c", curl_line(key, server.server_port)]
            subprocess.run(command, check=True, env={"PATH": str(programs)}, timeout=30, capture_output=True)
        finally:
            server.shutdown()
            thread.join()
    assert told == [f"Bearer {KEY}"]
    assert any("curl" in command for command in seen)
    assert not [command for command in seen if KEY in command]
