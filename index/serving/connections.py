"""Limits on connections, which ASGI does not show: how many one address opens, and how long a client may stop reading.

granian's backpressure counts connections, not requests. At its limit it accepts no connection, so one client that holds all
of them blocks every other client (emmett-framework/granian#789). Therefore granian's limit is as high as the process's file
descriptors allow, and this module limits each address: it closes the most idle connections of an address that holds too
many. The kernel closes connections of clients that do not read (TCP_USER_TIMEOUT).
"""

from __future__ import annotations

import asyncio
import fcntl
import resource
import socket
import struct
import termios
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

TICK = 0.5
"Seconds between two checks."

_RESERVE = 256
"File descriptors reserved for catalogue, staging and log."

_WANTED = 1 << 16
"File descriptors to request, if the hard limit allows them."

_LAST_DATA_SENT, _LAST_DATA_RECEIVED = 44, 52
"Offsets in struct tcp_info (linux/tcp.h); values are in milliseconds."


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Limits on the number of connections."""

    per_client: int
    total: int


def raise_limits(per_client: int) -> Bounds:
    """Raise the limit on file descriptors; return the connections it allows. A download uses two: its socket and its file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _WANTED if hard == resource.RLIM_INFINITY else min(hard, _WANTED)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    most = _WANTED if soft == resource.RLIM_INFINITY else soft
    return Bounds(per_client=per_client, total=max(64, (most - _RESERVE) // 2))


def set_deadline(port: int, seconds: float) -> None:
    """Disconnect clients that read nothing of a response for this time. Accepted sockets inherit the option."""
    for number in _descriptors():
        with _socket(number) as listener:
            if listener is not None and _ours(listener, port) and listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(seconds * 1000))


async def watch(port: int, bounds: Bounds, excused: Container[str]) -> None:
    """Enforce the limits until cancelled. `excused` are trusted proxies, which carry many clients."""
    while True:
        await asyncio.sleep(TICK)
        if len(_descriptors()) > bounds.per_client:  # fewer connections cannot exceed a limit; the check costs only this line
            await asyncio.get_running_loop().run_in_executor(None, trim, port, bounds, excused)


def trim(port: int, bounds: Bounds, excused: Container[str]) -> int:
    """Close connections above the limits: first those with an unread response, then the most idle. Returns the count."""
    held: dict[str, list[tuple[bool, int, int]]] = {}
    for number in _descriptors():
        with _socket(number) as connection:
            if connection is not None and (peer := _peer(connection, port)) is not None:
                held.setdefault(_group(peer, excused), []).append((*_quiet(connection), number))
    closing: list[tuple[bool, int, int]] = []
    for peer, connections in held.items():
        if peer and len(connections) > bounds.per_client:
            closing += sorted(connections, reverse=True)[: len(connections) - bounds.per_client]
    over = sum(map(len, held.values())) - len(closing) - bounds.total
    if over > 0:
        chosen = set(closing)
        closing += sorted((item for connections in held.values() for item in connections if item not in chosen), reverse=True)[
            :over
        ]
    close(port, [number for _, _, number in closing])
    return len(closing)


def close(port: int, numbers: Iterable[int] | None = None) -> None:
    """Close these connections of clients, or all of them."""
    for number in _descriptors() if numbers is None else numbers:
        with _socket(number) as connection:
            if connection is not None and _peer(connection, port) is not None:
                connection.shutdown(socket.SHUT_RDWR)


def _group(peer: str, excused: Container[str]) -> str:
    """The address that a connection counts for. For IPv6, the /64, which one client controls; "" for a trusted proxy."""
    if peer in excused:
        return ""
    address = ip_address(peer.partition("%")[0])
    return peer if address.version == 4 else str(int(address) >> 64)


def _descriptors() -> list[int]:
    return [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]


@contextmanager
def _socket(number: int) -> Iterator[socket.socket | None]:
    """The socket of a descriptor that the server keeps.

    This does not use os.dup: closing any descriptor of a file drops this process's locks on it (fcntl(2)), including those of
    SQLite, and between the check and the dup the number may have been reused for another file.
    """
    try:
        borrowed = socket.socket(fileno=number)
    except OSError:  # not a socket, or closed in the meantime
        yield None
        return
    try:
        yield borrowed
    except OSError:  # closed by either side in the meantime
        return
    finally:
        borrowed.detach()


def _peer(connection: socket.socket, port: int) -> str | None:
    """The client's address; None if this is not a client's connection."""
    if not _ours(connection, port):
        return None
    try:
        return str(connection.getpeername()[0])
    except OSError:
        return None


def _ours(candidate: socket.socket, port: int) -> bool:
    is_tcp = candidate.family in (socket.AF_INET, socket.AF_INET6) and candidate.type == socket.SOCK_STREAM
    return is_tcp and candidate.getsockname()[1] == port


def _quiet(connection: socket.socket) -> tuple[bool, int]:
    """Whether the client leaves a response unread, and the milliseconds since data was last sent or received."""
    unread = struct.unpack("=i", fcntl.ioctl(connection, termios.TIOCOUTQ, b"\0\0\0\0"))[0] > 0
    information = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    return unread, min(int(struct.unpack_from("=I", information, at)[0]) for at in (_LAST_DATA_SENT, _LAST_DATA_RECEIVED))
