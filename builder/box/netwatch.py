"""The recorder of network attempts. It runs in the sandbox's network namespace, refuses all attempts and reports them.

That namespace has only `lo`. The recorder

- answers DNS on 127.0.0.1:53 and [::1]:53 with NXDOMAIN, so that a build fails immediately instead of with a timeout;
- makes every address local to `lo`, so that a connection to a literal address is refused immediately, and reads the first
  packet of each connection from a packet socket.

It runs in `builder.box.supervisor`. Both import only the standard library, so that they start in hundredths of a second.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import ipaddress
import os
import selectors
import socket
import struct
import time
from collections.abc import Callable, Iterator

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
NS_GET_USERNS = 0xB701
PACKET_OUTGOING, ETH_P_ALL = 4, 3
SYN, SYN_ACK = 0x02, 0x12
DNS_PORT = 53
A, PTR = 1, 12
NOERROR, NXDOMAIN = 0, 3
SNAP = 512
MOST = 1000

Report = Callable[[str], None]


def join(pid: int) -> None:
    """Enter the network namespace of `pid` with all capabilities of the user namespace that owns it.

    Raises:
        OSError: the kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def call(result: int) -> None:
        if result != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    network = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
    owner = fcntl.ioctl(network, NS_GET_USERNS)
    # Root requires no user namespace for a network namespace, and a process cannot enter the user namespace that it is in.
    if not os.path.samestat(os.fstat(owner), os.stat("/proc/self/ns/user")):  # noqa: PTH116 pathlib is slower to import
        call(libc.setns(owner, CLONE_NEWUSER))
    call(libc.setns(network, CLONE_NEWNET))
    os.close(owner)
    os.close(network)


def wait_for_loopback() -> None:
    """Wait until bubblewrap, which runs concurrently, has brought `lo` up.

    Raises:
        OSError: `lo` is still down after some seconds.
    """
    siocgifflags, up = 0x8913, 0x1
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _ in range(1000):
            (flags,) = struct.unpack_from("=H", fcntl.ioctl(sock, siocgifflags, struct.pack("=16s16x", b"lo")), 16)
            if flags & up:
                return
            time.sleep(0.005)
    raise TimeoutError("lo is down")


def claim_all_addresses(family: socket.AddressFamily) -> None:
    """`ip route add local 0.0.0.0/0 dev lo src 127.0.0.1`, or the same for IPv6, by rtnetlink(7).

    With the preferred source, programs that determine their address by connecting a datagram socket get loopback.

    Raises:
        OSError: the kernel refuses, for example if IPv6 is disabled.
    """
    request, acknowledge, create, replace = 0x1, 0x4, 0x400, 0x100
    rtm_newroute, table_local, protocol_boot, scope_host, type_local = 24, 255, 3, 254, 2
    rta_oif, rta_prefsrc = 4, 7
    source = socket.inet_pton(family, "127.0.0.1" if family == socket.AF_INET else "::1")
    scope = scope_host if family == socket.AF_INET else 0
    body = struct.pack("=BBBBBBBBI", family, 0, 0, 0, table_local, protocol_boot, scope, type_local, 0)
    body += struct.pack("=HHI", 8, rta_oif, socket.if_nametoindex("lo"))
    body += struct.pack("=HH", 4 + len(source), rta_prefsrc) + source
    header = struct.pack("=IHHII", 16 + len(body), rtm_newroute, request | acknowledge | create | replace, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as netlink:
        netlink.send(header + body)
        (error,) = struct.unpack_from("=i", netlink.recv(4096), 16)
    if error:
        raise OSError(-error, os.strerror(-error))


def packet_socket() -> socket.socket:
    """A packet socket on `lo`, which receives packets to all addresses."""
    watcher = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)
    watcher.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    watcher.bind(("lo", ETH_P_ALL))
    return watcher


def describe(packet: bytes) -> Iterator[str]:
    """The destination of a TCP SYN or UDP packet to an address outside of loopback.

    The result is `address:port`, and for a DNS query to another server also the queried name.
    """
    version = packet[0] >> 4
    start, protocol = ((packet[0] & 0xF) * 4, packet[9]) if version == 4 else (40, packet[6])
    if protocol != socket.IPPROTO_UDP and (protocol != socket.IPPROTO_TCP or packet[start + 13] & SYN_ACK != SYN):
        return
    address = ipaddress.ip_address(packet[16:20] if version == 4 else packet[24:40])
    if address.is_loopback:
        return
    (port,) = struct.unpack_from("!H", packet, start + 2)
    yield f"{address}:{port}" if version == 4 else f"[{address}]:{port}"
    if protocol == socket.IPPROTO_UDP and port == DNS_PORT:
        with contextlib.suppress(ValueError):
            yield question(packet[start + 8 :])[0]


def question(message: bytes) -> tuple[str, int, int]:
    """Name, type and end offset of the first question of a DNS message (RFC 1035, 4.1).

    Raises:
        ValueError: it is not a question.
    """
    labels: list[str] = []
    try:
        flags, count = struct.unpack_from("!HH", message, 2)
        if flags & 0x8000 or count == 0:
            raise ValueError("not a question")
        offset = 12
        while length := message[offset]:
            if length > 63:  # RFC 1035: a pointer, which a question has no use for
                raise ValueError("compressed name")
            label = message[offset + 1 : offset + 1 + length]
            labels.append("".join(chr(byte) if 0x21 <= byte < 0x7F else f"\\{byte:03}" for byte in label))
            offset += 1 + length
        (kind,) = struct.unpack_from("!H", message, offset + 1)
    except (struct.error, IndexError) as error:
        raise ValueError("truncated") from error
    return ".".join(labels).lower(), kind, offset + 5


def is_own(name: str, kind: int, hostname: str) -> bool:
    """Whether the name belongs to this machine: its host name, localhost, or the reverse of a loopback address."""
    if kind == PTR:
        return name.endswith(".127.in-addr.arpa") or (name.endswith("0.0.0.ip6.arpa") and name.startswith("1.0.0."))
    return name in ("", hostname, "localhost") or name.endswith(".localhost")


def answer(message: bytes, hostname: str, report: Report) -> bytes:
    """The reply to a DNS message: names of this machine exist; all others do not, and are reported.

    Raises:
        ValueError: it is not a question.
    """
    name, kind, end = question(message)
    own = is_own(name, kind, hostname)
    if not own:
        report(name)
    has_address = own and kind == A
    header = message[:2] + struct.pack("!HHHHH", 0x8580 | (NOERROR if own else NXDOMAIN), 1, int(has_address), 0, 0)
    record = struct.pack("!HHHIH4s", 0xC00C, A, 1, 0, 4, socket.inet_aton("127.0.0.1")) if has_address else b""
    return header + message[12:end] + record


class Recorder:
    """The sockets of the recorder, and the handling of received data.

    Raises:
        OSError: the kernel refuses packet sockets.
    """

    def __init__(self, selector: selectors.BaseSelector, hostname: str, report: Report) -> None:
        self._selector = selector
        self._hostname = hostname
        self._seen: set[str] = set()
        self._write = report
        self._watcher = packet_socket()
        self._serve(self._watcher, lambda _: self._packets())

    def watch(self, family: socket.AddressFamily) -> None:
        """Claim all addresses of one family and answer DNS with it, in the current network namespace.

        Raises:
            OSError: the kernel does not support the family, or refuses.
        """
        claim_all_addresses(family)
        loopback = "127.0.0.1" if family == socket.AF_INET else "::1"
        datagrams = socket.socket(family, socket.SOCK_DGRAM)
        datagrams.bind((loopback, DNS_PORT))
        self._serve(datagrams, self._datagram)
        self._serve(socket.create_server((loopback, DNS_PORT), family=family), self._accept)

    def _serve(self, sock: socket.socket, handle: Callable[[socket.socket], None]) -> None:
        def ready() -> None:
            # A build may send anything, or close a connection at any moment. Neither may stop the recorder.
            with contextlib.suppress(OSError, ValueError, struct.error, IndexError):
                handle(sock)

        sock.setblocking(False)
        self._selector.register(sock, selectors.EVENT_READ, ready)

    def _report(self, text: str) -> None:
        """Report each attempt once, and at most a thousand, in case a build scans addresses."""
        if text not in self._seen and len(self._seen) < MOST:
            self._seen.add(text)
            self._write(text)

    def _packets(self) -> None:
        for _ in range(MOST):
            try:
                packet, address = self._watcher.recvfrom(SNAP)
            except BlockingIOError:
                return
            # Packets on lo are seen twice, outgoing and incoming. Only incoming ones have passed the routes.
            if address[2] != PACKET_OUTGOING:
                with contextlib.suppress(ValueError, struct.error, IndexError):
                    for text in describe(packet):
                        self._report(text)

    def _answer(self, message: bytes) -> bytes:
        # The client waits for our reply, so earlier attempts are already in the packet socket, and the order is preserved.
        self._packets()
        return answer(message, self._hostname, self._report)

    def _datagram(self, datagrams: socket.socket) -> None:
        message, sender = datagrams.recvfrom(SNAP)
        datagrams.sendto(self._answer(message), sender)

    def _accept(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        self._serve(connection, self._stream)

    def _stream(self, connection: socket.socket) -> None:
        """Answer a query by TCP: length, message. Clients send it in one piece, so a partial message ends the connection."""
        self._selector.unregister(connection)
        with connection:
            message = connection.recv(2 + SNAP)
            reply = self._answer(message[2:])
            connection.send(struct.pack("!H", len(reply)) + reply)


def start(pid: int, selector: selectors.BaseSelector, hostname: str, report: Report) -> None:
    """Register callbacks (the data of `selector`) that record attempts in the network namespace of `pid`.

    The calling process must have one thread. It stays in that namespace.

    Raises:
        OSError: the kernel or its security module does not allow it.
    """
    join(pid)
    wait_for_loopback()
    recorder = Recorder(selector, hostname, report)
    recorder.watch(socket.AF_INET)
    with contextlib.suppress(OSError):  # a kernel without IPv6
        recorder.watch(socket.AF_INET6)
