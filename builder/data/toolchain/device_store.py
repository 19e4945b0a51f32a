"""The store of device code. It keeps the results of device passes; the key of a result is the digest of all its inputs.

GRACEFARM_DEVICE_STORE: the folder of the store; if it is empty, there is no store.
GRACEFARM_DEVICE_COMPILERS: the digest of the compilers.

Each result is one file. The file begins with the sha256 of the compressed data that follows. The compressed data consists of a
JSON header and the contents. `put` writes a temporary file and then renames it, so a result is never partly written.
"""

import hashlib
import json
import os
import tempfile
import zlib
from dataclasses import dataclass, field


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
    """Read a result from the store. The function returns None if the result is missing or damaged."""
    if not (store := os.environ.get("GRACEFARM_DEVICE_STORE")):
        return None
    place = os.path.join(store, key[:2], key)
    try:
        with open(place, "rb") as stream:
            content = stream.read()
        head, body = content[:64], content[65:]
        if hashlib.sha256(body).hexdigest().encode() != head:
            return None
        os.utime(place)  # the builder removes the least recently used results first
        unpacked = zlib.decompress(body)
        length = int.from_bytes(unpacked[:4], "big")
        header = json.loads(unpacked[4 : 4 + length])
    except (OSError, ValueError, zlib.error):
        return None
    contents, at = [], 4 + length
    for size in header["sizes"]:
        contents.append(unpacked[at : at + size])
        at += size
    files = dict(zip(header["names"], contents[2:], strict=True))
    return Result(out=contents[0], err=contents[1], files=files, cost=header["cost"])


def put(key: str, result: Result) -> None:
    """Write a complete result to the store.

    If the store cannot be written, the function keeps nothing. The build is then slower, but its output is the same.
    """
    if not (store := os.environ.get("GRACEFARM_DEVICE_STORE")):
        return
    contents = [result.out, result.err, *result.files.values()]
    header = {"names": list(result.files), "sizes": [len(content) for content in contents], "cost": result.cost}
    text = json.dumps(header).encode()
    body = zlib.compress(b"".join([len(text).to_bytes(4, "big"), text, *contents]), 1)
    partial = ""
    try:
        folder = os.path.join(store, key[:2])
        os.makedirs(folder, exist_ok=True)
        descriptor, partial = tempfile.mkstemp(dir=folder, prefix=".", suffix=".partial")
        with open(descriptor, "wb") as stream:
            stream.write(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
        os.rename(partial, os.path.join(folder, key))
    except OSError:
        if partial and os.path.exists(partial):
            os.unlink(partial)
