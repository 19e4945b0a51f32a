from __future__ import annotations

import contextlib
import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.box import netwatch

HEADER = struct.pack("!HHHHHH", 0x1234, 0x0100, 1, 0, 0, 0)
A, AAAA, PTR = 1, 28, 12


def query(name: str, kind: int = A) -> bytes:
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split(".") if label)
    return HEADER + labels + b"\0" + struct.pack("!HH", kind, 1)


def ask(message: bytes) -> tuple[bytes, list[str]]:
    asked: list[str] = []
    return netwatch.answer(message, "build", asked.append), asked


def test_a_foreign_name_is_reported_and_does_not_exist() -> None:
    reply, asked = ask(query("Files.Example.ORG"))
    assert asked == ["files.example.org"]
    assert reply[:2] == b"\x12\x34"
    flags, *counts = struct.unpack_from("!HHHHH", reply, 2)
    assert flags & 0x8000
    assert flags & 0xF == 3, "NXDOMAIN"
    assert counts == [1, 0, 0, 0]


@pytest.mark.parametrize("name", ["build", "localhost", "app.localhost", ""])
def test_own_names_exist_and_are_not_reported(name: str) -> None:
    reply, asked = ask(query(name))
    assert asked == []
    assert reply.endswith(socket.inet_aton("127.0.0.1"))
    assert struct.unpack_from("!H", reply, 2)[0] & 0xF == 0


def test_own_name_has_no_other_records() -> None:
    reply, asked = ask(query("build", AAAA))
    assert asked == []
    assert struct.unpack_from("!HHHHH", reply, 2)[2] == 0


@pytest.mark.parametrize(
    ("name", "reported"),
    [
        ("1.0.0.127.in-addr.arpa", False),
        ("1." + "0." * 31 + "ip6.arpa", False),
        ("8.8.8.8.in-addr.arpa", True),
        ("1.0.0.0." + "0." * 24 + "8.b.d.0.1.0.0.2.ip6.arpa", True),
    ],
)
def test_reverse_look_ups_of_loopback_are_not_reported(name: str, reported: bool) -> None:
    assert bool(ask(query(name, PTR))[1]) is reported


def test_odd_bytes_in_a_name_cannot_forge_a_line() -> None:
    _, asked = ask(HEADER + b"\x05a\nb\xff \0" + struct.pack("!HH", A, 1))
    assert asked == ["a\\010b\\255\\032"]


@given(st.binary(max_size=100))
def test_garbage_is_an_error_of_one_kind(garbage: bytes) -> None:
    with contextlib.suppress(ValueError):
        ask(garbage)


@given(st.binary(max_size=60))
def test_garbage_after_a_header_is_an_error_of_one_kind(garbage: bytes) -> None:
    with contextlib.suppress(ValueError):
        ask(HEADER + garbage)


def test_a_question_to_another_server_is_described_by_address_and_name() -> None:
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 0, 0, 0, 64, 17, 0, b"\x7f\0\0\1", b"\x08\x08\x08\x08")
    packet = ip + struct.pack("!HHHH", 40000, 53, 0, 0) + query("example.org")
    assert list(netwatch.describe(packet)) == ["8.8.8.8:53", "example.org"]


def tcp(version: int, address: str, flags: int) -> bytes:
    """The first packet of a connection to port 443, or a later one, by its flags."""
    segment = struct.pack("!HHIIBBHHH", 40000, 443, 0, 0, 0x50, flags, 0, 0, 0)
    if version == 4:
        return struct.pack("!BBHHHBBH4s4s", 0x45, 0, 0, 0, 0, 64, 6, 0, b"\x7f\0\0\1", socket.inet_aton(address)) + segment
    target = socket.inet_pton(socket.AF_INET6, address)
    return struct.pack("!IHBB16s16s", 0x60000000, 20, 6, 64, b"\0" * 15 + b"\1", target) + segment


def test_an_ipv6_packet_is_described_with_brackets() -> None:
    assert list(netwatch.describe(tcp(6, "2001:db8::7", netwatch.SYN))) == ["[2001:db8::7]:443"]


@pytest.mark.parametrize(("version", "address", "loopback"), [(4, "192.0.2.7", "127.9.9.9"), (6, "2001:db8::7", "::1")])
def test_later_packets_and_loopback_are_no_attempts(version: int, address: str, loopback: str) -> None:
    assert len(list(netwatch.describe(tcp(version, address, netwatch.SYN)))) == 1
    for packet in (tcp(version, address, netwatch.SYN_ACK), tcp(version, address, 0x10), tcp(version, loopback, netwatch.SYN)):
        assert list(netwatch.describe(packet)) == []
