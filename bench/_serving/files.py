"""Serves a folder over HTTP, and prints its address: `python -m bench._serving.files HOST PORT FOLDER`."""

from __future__ import annotations

import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


def main() -> None:
    """See the module."""
    host, port, folder = sys.argv[1:]
    with ThreadingHTTPServer((host, int(port)), partial(_Quiet, directory=folder)) as server:
        sys.stdout.write(f"http://{host}:{port}\n")
        sys.stdout.flush()
        server.serve_forever()


if __name__ == "__main__":
    main()
