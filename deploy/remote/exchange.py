"""Sends 64 KiB in both directions between two nodes, since single small packets are not sufficient as a test.

If interfaces send larger packets than the network supports (MTU 9000 on nodes, 1500 on a switch), connections are established
and short messages arrive, but full packets are lost without an error.
"""

from __future__ import annotations

import socket
from contextlib import suppress

from deploy.remote.network import interfaces
from deploy.remote.wire import Json, WorkerError

SIZE = 1 << 16
"Bytes in each direction. This is more than any frame, so there are full packets."
SECONDS = 8.0
"Timeout. A network that needs longer for 64 KiB is too slow for serving."


def ask(me: str, address: str, port: int) -> Json:
    """Exchange data with a peer. Return {} if it works, else `stalled`: the direction in which full packets are lost."""
    stage = ""
    try:
        with socket.create_connection((address, port), timeout=SECONDS) as connection:
            connection.sendall(f"gracefarm {me} bulk\n".encode())
            if connection.recv(3) != b"go\n":
                return {}  # another service, which the check of ports reports
            stage = "to"
            connection.sendall(bytes(SIZE))
            if connection.recv(3) == b"ok\n":
                stage = "from"
                _take(connection)
    except TimeoutError:
        return {"stalled": stage} if stage else {}
    except OSError:
        return {}  # refused or reset, which the check of ports reports
    return {}


def answer(connection: socket.socket) -> None:
    """The server's part of the exchange, after the greeting."""
    connection.settimeout(SECONDS)
    with suppress(OSError):
        connection.sendall(b"go\n")
        _take(connection)
        connection.sendall(b"ok\n")
        connection.sendall(bytes(SIZE))


def _take(connection: socket.socket) -> None:
    left = SIZE
    while left:
        block = connection.recv(left)
        if not block:
            raise ConnectionResetError
        left -= len(block)


def mtu(address: str) -> int | None:
    """The MTU of the interface with this address in bytes; None: unknown."""
    with suppress(WorkerError):
        holding = (link for link in interfaces() if address in [held["address"] for held in link["addresses"]])
        return next((link["mtu"] for link in holding), None)
    return None
