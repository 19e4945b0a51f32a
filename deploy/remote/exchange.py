"""64 KiB each way between two nodes: what no single small packet proves.

Where interfaces send larger packets than the network between them carries (MTU 9000 on nodes, 1500 on a switch), connections
are made, greetings arrive, and everything that fills a packet is lost without a word.
"""

from __future__ import annotations

import socket
from contextlib import suppress

from deploy.remote.network import interfaces
from deploy.remote.wire import Json, WorkerError

SIZE = 1 << 16
"Bytes each way: more than any frame, so that full packets are among them."
SECONDS = 8.0
"For all of it; a network that takes longer for 64 KiB serves no model."


def ask(me: str, address: str, port: int) -> Json:
    """Exchange with the peer that listens there: {} is well, `stalled` (`to` or `from`) where full packets do not arrive."""
    stage = ""
    try:
        with socket.create_connection((address, port), timeout=SECONDS) as connection:
            connection.sendall(f"gracefarm {me} bulk\n".encode())
            if connection.recv(3) != b"go\n":
                return {}  # another service: the ports say so
            stage = "to"
            connection.sendall(bytes(SIZE))
            if connection.recv(3) == b"ok\n":
                stage = "from"
                _take(connection)
    except TimeoutError:
        return {"stalled": stage} if stage else {}
    except OSError:
        return {}  # refused or reset: the ports say so
    return {}


def answer(connection: socket.socket) -> None:
    """The other side of `ask`, after its greeting."""
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
    """Of the interface that has the address, in bytes; None: not known."""
    with suppress(WorkerError):
        holding = (link for link in interfaces() if address in [held["address"] for held in link["addresses"]])
        return next((link["mtu"] for link in holding), None)
    return None
