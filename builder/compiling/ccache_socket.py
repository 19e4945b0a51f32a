"""A Unix socket in a build's folder, through which ccache and device_store.py request remote entries, since a build has no
network.

The protocol is that of ccache's storage helpers, version 1 (doc/remote_storage_helper_spec.md in ccache's source).
ccache's keys are binary. Other users of the socket begin their keys with their kind and a slash.
"""

from __future__ import annotations

import os
import socketserver
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from builder.toolchains.ccache import SOCKET

GREETING = b"\x01\x01\x00"
"Version 1, one capability: get, put and remove."
GET, PUT, REMOVE, STOP = b"\x00", b"\x01", b"\x02", b"\x03"
OK, NOTHING = b"\x00", b"\x01"
LARGEST = 64 << 20
"Largest entry, in bytes."
_SIZE = struct.Struct("=Q")


class Entries(Protocol):
    """A store of entries."""

    def get(self, kind: str, key: str) -> bytes | None:
        """The bytes of an entry; None: it does not exist."""

    def put(self, kind: str, key: str, content: bytes) -> bool:
        """Store an entry; False: it was not stored."""


@contextmanager
def serving(folder: Path, entries: Entries) -> Iterator[None]:
    """Serve the socket in `folder` during the `with` block."""

    class CcacheConnection(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            """Serve one client until it closes the connection."""
            with _closed_connections():
                self.wfile.write(GREETING)
                while answer(self, entries):
                    self.wfile.flush()

    class Server(socketserver.ThreadingUnixStreamServer):
        daemon_threads = True
        request_queue_size = 1024  # with a full queue, the connection of a compiler fails; a large machine starts hundreds

    place = folder / SOCKET
    place.unlink(missing_ok=True)
    # The path of a socket may have at most 107 bytes, and a build's folder has a longer path.
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        server = Server(f"/proc/self/fd/{descriptor}/{SOCKET}", CcacheConnection)
    finally:
        os.close(descriptor)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
    with server:
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            place.unlink(missing_ok=True)


@contextmanager
def _closed_connections() -> Iterator[None]:
    """Ignore closed connections: a killed compiler closes its connection at any point."""
    try:
        yield
    except (ConnectionError, EOFError):
        return


def answer(connection: socketserver.StreamRequestHandler, entries: Entries) -> bool:
    """Answer one request; False: the connection was closed."""
    operation = connection.rfile.read(1)
    if operation not in (GET, PUT, REMOVE):
        if operation == STOP:
            connection.wfile.write(OK)
        return False
    kind, key = _name(_exactly(connection, _exactly(connection, 1)[0]))
    if operation == GET:
        content = entries.get(kind, key)
        connection.wfile.write(NOTHING if content is None else OK + _SIZE.pack(len(content)) + content)
    elif operation == PUT:
        _exactly(connection, 1)  # flags: to overwrite or not
        (size,) = _SIZE.unpack(_exactly(connection, _SIZE.size))
        if size > LARGEST:
            return False
        content = _exactly(connection, size)
        connection.wfile.write(OK if entries.put(kind, key, content) else NOTHING)
    else:
        connection.wfile.write(NOTHING)
    return True


def _name(key: bytes) -> tuple[str, str]:
    """Kind and key in hex: `device/…` for the store of device code, else ccache's."""
    kind, slash, rest = key.partition(b"/")
    return ("device", rest.hex()) if slash and kind == b"device" else ("ccache", key.hex())


def _exactly(connection: socketserver.StreamRequestHandler, size: int) -> bytes:
    """Read exactly `size` bytes.

    Raises:
        EOFError: the connection was closed before.
    """
    content = connection.rfile.read(size)
    if len(content) < size:
        raise EOFError
    return content
