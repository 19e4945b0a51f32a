"""The store of device code. It keeps the results of device passes; the key of a result is the digest of all its inputs.

GRACEFARM_DEVICE_STORE: the folder of the store; if it is empty, there is no store.
GRACEFARM_DEVICE_COMPILERS: the digest of the compilers.
GRACEFARM_DEVICE_SOCKET: the socket of the shared cache; if it is empty, there is no shared cache. The builder listens on the
socket, because a build has no network. builder/compiling/ccache_socket.py describes the protocol. If the folder has no result,
`get` asks the socket, and keeps the answer in the folder. `put` also sends the result to the socket. After the first failure
of the socket, the program creates the file SOCKET.off, and the passes that follow do not use the socket. So a dead socket
delays a build by at most PATIENCE.

Each result is one file. The file begins with the sha256 of the compressed data that follows. The compressed data consists of a
JSON header and the contents. `put` writes a temporary file and then renames it, so a result is never partly written.
"""

import hashlib
import json
import os
import socket
import struct
import tempfile
import time
import zlib
from contextlib import suppress
from dataclasses import dataclass, field

GREETING = b"\x01\x01\x00"
"The protocol of the socket: version 1 with get and put."
LARGEST = 64 << 20
"Largest entry of the socket, in bytes."
PATIENCE = 10.0
"Seconds that a request to the socket may take."
_GET, _PUT, _OVERWRITE, _OK, _NOTHING = b"\x00", b"\x01", b"\x01", b"\x00", b"\x01"
_SIZE = struct.Struct("=Q")


@dataclass
class Result:
    """The output of a pass: its messages, and its files by short names."""

    out: bytes = b""
    err: bytes = b""
    files: dict[str, bytes] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)
    "The CPU seconds, the wall seconds and the bytes of memory that the pass used."


def digest(*parts: object) -> str:
    """The key of a result: a digest of texts, lists and bytes. The length of each part is hashed before the part."""
    whole = hashlib.sha256()
    for part in (os.environ.get("GRACEFARM_DEVICE_COMPILERS", ""), *parts):
        content = part if isinstance(part, bytes) else json.dumps(part).encode()
        whole.update(b"%d:" % len(content) + content)
    return whole.hexdigest()


def get(key: str) -> Result | None:
    """Read a result from the store, or from the shared cache. The function returns None if it is missing or damaged."""
    if not (store := os.environ.get("GRACEFARM_DEVICE_STORE")):
        return None
    place = os.path.join(store, key[:2], key)
    try:
        with open(place, "rb") as stream:
            result = unpacked(stream.read())
        os.utime(place)  # the builder removes the least recently used results first
    except OSError:
        result = None
    if result is not None:
        return result
    content = request(_GET, key)
    result = unpacked(content) if content is not None else None
    if content is not None and result is not None:
        keep(store, key, content)
    return result


def put(key: str, result: Result) -> None:
    """Write a complete result to the store, and send it to the shared cache.

    If the store cannot be written, the function keeps nothing. The build is then slower, but its output is the same.
    """
    if not (store := os.environ.get("GRACEFARM_DEVICE_STORE")):
        return
    content = packed(result)
    keep(store, key, content)
    if len(content) <= LARGEST:
        request(_PUT, key, _OVERWRITE + _SIZE.pack(len(content)) + content)


def packed(result: Result) -> bytes:
    """The content of a result's file."""
    contents = [result.out, result.err, *result.files.values()]
    header = {"names": list(result.files), "sizes": [len(content) for content in contents], "cost": result.cost}
    text = json.dumps(header).encode()
    body = zlib.compress(b"".join([len(text).to_bytes(4, "big"), text, *contents]), 1)
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def unpacked(content: bytes) -> Result | None:
    """The result in a file. The function returns None if the content is damaged."""
    head, body = content[:64], content[65:]
    if hashlib.sha256(body).hexdigest().encode() != head:
        return None
    try:
        whole = zlib.decompress(body)
        length = int.from_bytes(whole[:4], "big")
        header = json.loads(whole[4 : 4 + length])
        contents, at = [], 4 + length
        for size in header["sizes"]:
            contents.append(whole[at : at + size])
            at += size
        files = dict(zip(header["names"], contents[2:], strict=True))
        return Result(out=contents[0], err=contents[1], files=files, cost=dict(header["cost"]))
    except (ValueError, LookupError, TypeError, zlib.error):
        return None


def keep(store: str, key: str, content: bytes) -> None:
    """Write the file of a result, if the disk allows it."""
    partial = ""
    try:
        folder = os.path.join(store, key[:2])
        os.makedirs(folder, exist_ok=True)
        descriptor, partial = tempfile.mkstemp(dir=folder, prefix=".", suffix=".partial")
        with open(descriptor, "wb") as stream:
            stream.write(content)
        os.rename(partial, os.path.join(folder, key))
    except OSError:
        if partial and os.path.exists(partial):
            os.unlink(partial)


def request(operation: bytes, key: str, content: bytes = b"") -> bytes | None:
    """Send a request to the socket; return the entry. The function returns None if there is no entry, or no working socket."""
    place = os.environ.get("GRACEFARM_DEVICE_SOCKET")
    if not place or os.path.exists(f"{place}.off"):
        return None
    deadline = time.monotonic() + PATIENCE
    name = b"device/" + bytes.fromhex(key)
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(PATIENCE)
            client.connect(place)
            if received(client, len(GREETING), deadline) != GREETING:
                raise OSError("an unknown protocol")
            client.sendall(operation + bytes([len(name)]) + name + content)
            status = received(client, 1, deadline)
            if status == _OK and operation == _GET:
                (size,) = _SIZE.unpack(received(client, _SIZE.size, deadline))
                return received(client, size, deadline)
            if status not in (_OK, _NOTHING):
                raise OSError("an unknown answer")
    except OSError:
        with suppress(OSError), open(f"{place}.off", "wb"):
            pass
    return None


def received(client: socket.socket, size: int, deadline: float) -> bytes:
    """Receive exactly `size` bytes.

    Raises:
        OSError: the size is above LARGEST, the connection was closed, or the deadline has passed.
    """
    if size > LARGEST:
        raise OSError("the entry is too large")
    content = bytearray()
    while len(content) < size:
        client.settimeout(max(0.001, deadline - time.monotonic()))
        part = client.recv(min(size - len(content), 1 << 20))
        if not part:
            raise OSError("the connection was closed")
        content += part
        if time.monotonic() > deadline:
            raise OSError("the answer took too long")
    return bytes(content)
