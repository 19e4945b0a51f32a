"""Bounds on connections, which ASGI does not show: how many one address holds, and how long one may stop reading.

granian's backpressure counts connections, not requests: at the bound it accepts nobody, so one client that holds that many
stops everybody (emmett-framework/granian#789). Here it is as high as the process's file descriptors allow, and the one that
is held back is the address that holds too many: its quietest connections are closed. What does not read is ended by the
kernel (TCP_USER_TIMEOUT).
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
"Seconds between two looks."

_RESERVE = 256
"File descriptors for everything that is not a client: catalogue, staging, log."

_WANTED = 1 << 16
"File descriptors asked for, where the hard limit allows them."

_LAST_DATA_SENT, _LAST_DATA_RECEIVED = 44, 52
"Offsets in struct tcp_info (linux/tcp.h): milliseconds since."


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """How many connections there may be."""

    per_client: int
    total: int


def raise_limits(per_client: int) -> Bounds:
    """Raise the limit on file descriptors and say what it allows: a download takes two, its socket and its file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _WANTED if hard == resource.RLIM_INFINITY else min(hard, _WANTED)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    most = _WANTED if soft == resource.RLIM_INFINITY else soft
    return Bounds(per_client=per_client, total=max(64, (most - _RESERVE) // 2))


def set_deadline(port: int, seconds: float) -> None:
    """Clients that take nothing of an answer for so long are cut off; accepted sockets inherit it from the listener."""
    for number in _descriptors():
        with _socket(number) as listener:
            if listener is not None and _ours(listener, port) and listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(seconds * 1000))


async def watch(port: int, bounds: Bounds, excused: Container[str]) -> None:
    """Keep the bounds until cancelled. `excused` are trusted proxies, through which many clients come."""
    while True:
        await asyncio.sleep(TICK)
        if len(_descriptors()) > bounds.per_client:  # else there is nothing to bound, and this is all it costs
            await asyncio.get_running_loop().run_in_executor(None, trim, port, bounds, excused)


def trim(port: int, bounds: Bounds, excused: Container[str]) -> int:
    """Close what is over the bounds, first who leaves an answer unread, then the quietest; returns how many."""
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
    """Close connections of clients: these, or every one."""
    for number in _descriptors() if numbers is None else numbers:
        with _socket(number) as connection:
            if connection is not None and _peer(connection, port) is not None:
                connection.shutdown(socket.SHUT_RDWR)


def _group(peer: str, excused: Container[str]) -> str:
    """Whom a connection counts for: the address, of IPv6 the /64 that one client commands; "" for a trusted proxy."""
    if peer in excused:
        return ""
    address = ip_address(peer.partition("%")[0])
    return peer if address.version == 4 else str(int(address) >> 64)


def _descriptors() -> list[int]:
    return [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]


@contextmanager
def _socket(number: int) -> Iterator[socket.socket | None]:
    """The socket behind a descriptor that stays the server's.

    Not through os.dup: closing any descriptor of a file drops this process's locks on it (fcntl(2)), SQLite's among them, and
    between a look and the dup a number may come to mean another file.
    """
    try:
        borrowed = socket.socket(fileno=number)
    except OSError:  # no socket, or closed meanwhile
        yield None
        return
    try:
        yield borrowed
    except OSError:  # closed by either side meanwhile
        return
    finally:
        borrowed.detach()


def _peer(connection: socket.socket, port: int) -> str | None:
    """The client's address; None when this is no connection of a client."""
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
    """Does the client leave an answer unread, and milliseconds since anything was sent or received."""
    unread = struct.unpack("=i", fcntl.ioctl(connection, termios.TIOCOUTQ, b"\0\0\0\0"))[0] > 0
    information = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    return unread, min(int(struct.unpack_from("=I", information, at)[0]) for at in (_LAST_DATA_SENT, _LAST_DATA_RECEIVED))
