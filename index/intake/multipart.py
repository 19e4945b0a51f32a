"""Streaming parser for multipart/form-data: text fields go into memory, the file goes to staging and is hashed on the way."""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.types import Receive

from index.errors import RefusedError, StalledError, TooLargeError
from index.limits import Limits
from index.store.files import Store, disk_errors, flush

BATCH = 1 << 20
"Bytes to pass to the disk thread in one piece."

MAX_PARTS = 2000

SIGNATURE = "gpg_signature"
"A field that older clients send, as file or text. It is ignored, as on PyPI, which stores no signatures."

DIGESTS: Mapping[str, Callable[[], Any]] = MappingProxyType(
    {
        "sha256_digest": hashlib.sha256,
        "md5_digest": partial(hashlib.md5, usedforsecurity=False),
        "blake2_256_digest": partial(hashlib.blake2b, digest_size=32),
    }
)
"Fields of the form that announce a digest, with their hash function."


@dataclass(kw_only=True)
class Received:
    """A file in staging, flushed to the disk. The caller removes it or adopts it into the store."""

    filename: str
    path: Path
    digests: dict[str, str] = field(default_factory=dict)
    "By the field names of the form; sha256_digest is always present."


@dataclass(kw_only=True)
class Form:
    """A completely received form."""

    fields: dict[str, list[str]] = field(default_factory=dict)
    files: dict[str, Received] = field(default_factory=dict)

    def value(self, name: str) -> str:
        """The only value of a field; empty if it is absent.

        Raises:
            RefusedError: the field was sent more than once.
        """
        values = self.fields.get(name, [])
        if len(values) > 1:
            raise RefusedError(f"the form contains {name} {len(values)} times", remedy="send this field once")
        return values[0].strip() if values else ""

    def discard(self) -> None:
        """Remove the staged file."""
        for received in self.files.values():
            received.path.unlink(missing_ok=True)


_FOLDER = re.compile(r'filename="?(.:\\|\\\\)', re.IGNORECASE)


class _FileWriter:
    """Writes and hashes in a thread while more bytes arrive."""

    def __init__(self, received: Received, executor: Executor, fields: set[str]) -> None:
        self.received = received
        self._executor = executor
        self._stream: IO[bytes] = received.path.open("xb", buffering=0)
        self._hashes = {name: DIGESTS[name]() for name in fields}
        self._parts: list[bytes] = []
        self._held = 0
        self._pending: asyncio.Future[None] | None = None

    async def write(self, data: bytes) -> None:
        self._parts.append(data)
        self._held += len(data)
        if self._held >= BATCH:
            await self._hand_over(last=False)

    async def finish(self) -> None:
        """Finish hashing, writing and flushing."""
        await self._hand_over(last=True)
        await self._settle()
        self.received.digests = {name: value.hexdigest() for name, value in self._hashes.items()}

    async def _settle(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            await pending

    async def _hand_over(self, *, last: bool) -> None:
        await self._settle()
        parts, self._parts, self._held = self._parts, [], 0
        loop = asyncio.get_running_loop()
        self._pending = loop.run_in_executor(self._executor, self._put, parts, last)

    def _put(self, parts: list[bytes], last: bool) -> None:
        with disk_errors(self.received.path.parent.parent):
            data = b"".join(parts)
            rest = memoryview(data)
            while rest:
                rest = rest[self._stream.write(rest) :]
            for value in self._hashes.values():
                value.update(data)
            if last:
                flush(self._stream)
                self._stream.close()

    async def close(self) -> None:
        """Stop, in any state."""
        if self._pending is not None:
            await asyncio.wait([self._pending])
        self._stream.close()


class _Reader:
    """Collects parser callbacks as ordered events."""

    def __init__(self, boundary: bytes) -> None:
        self.events: list[tuple[str, bytes]] = []
        self.ended = False
        self.parser = MultipartParser(
            boundary,
            {
                "on_part_begin": lambda: self.events.append(("begin", b"")),
                "on_part_data": lambda data, start, end: self.events.append(("data", data[start:end])),
                "on_part_end": lambda: self.events.append(("end", b"")),
                "on_header_field": lambda data, start, end: self.events.append(("name", data[start:end])),
                "on_header_value": lambda data, start, end: self.events.append(("value", data[start:end])),
                "on_header_end": lambda: self.events.append(("header-end", b"")),
                "on_headers_finished": lambda: self.events.append(("headers", b"")),
                "on_end": self._end,
            },
        )

    def _end(self) -> None:
        self.ended = True

    def feed(self, data: bytes) -> list[tuple[str, bytes]]:
        try:
            self.parser.write(data)
        except MultipartParseError as error:
            raise RefusedError(
                f"the form is malformed: {error}", remedy="send multipart/form-data as twine and uv do"
            ) from None
        events, self.events = self.events, []
        return events


class _Assembler:
    """Builds the form from the events."""

    def __init__(self, form: Form, store: Store, limits: Limits, executor: Executor) -> None:
        self.form = form
        self.writer: _FileWriter | None = None
        self._store, self._limits, self._executor = store, limits, executor
        self._header = {"name": b"", "value": b""}
        self._headers: dict[str, str] = {}
        self._name = ""
        self._text: list[bytes] | None = None
        self._held = 0
        self._parts = 0

    async def take(self, kind: str, data: bytes) -> None:
        match kind:
            case "data":
                await self._data(data)
            case "name" | "value":
                self._header[kind] += data
            case "header-end":
                self._headers[self._header["name"].decode("latin-1").lower()] = self._header["value"].decode("latin-1")
                self._header = {"name": b"", "value": b""}
            case "begin":
                self._headers, self._text = {}, None
            case "headers":
                self._open()
            case "end":
                await self._close()

    def _open(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise TooLargeError(f"the form has more than {MAX_PARTS} fields", remedy="send fewer fields")
        try:
            disposition, options = parse_options_header(self._headers.get("content-disposition", ""))
        except (UnicodeError, LookupError, ValueError):  # filename* names an unknown encoding
            raise RefusedError("a part of the form has a name in an unknown encoding", remedy="send names as UTF-8") from None
        if _FOLDER.search(self._headers.get("content-disposition", "")):
            # The parser would silently use the text after the last backslash, for the sake of old browsers.
            raise RefusedError(
                "the file's name is not a plain file name: it contains a folder", remedy="send only the file name"
            )
        if disposition != b"form-data" or b"name" not in options:
            raise RefusedError("a part of the form has no name", remedy="send multipart/form-data as twine and uv do")
        self._name = options[b"name"].decode("utf-8", "replace")
        if b"filename" not in options:
            self._text = []
            return
        if self._name == SIGNATURE:
            self._text = []
            return
        if self.form.files:
            raise RefusedError("the form contains more than one file", remedy="upload one file for each request")
        received = Received(filename=options[b"filename"].decode("utf-8", "replace"), path=self._store.new_staging())
        self.form.files[self._name] = received
        # Always sha256; the others only if the form names them. Clients send the fields before the file.
        announced = {name for name in DIGESTS if self.form.fields.get(name)}
        with disk_errors(self._store.root):
            self.writer = _FileWriter(received, self._executor, {"sha256_digest"} | announced)

    async def _data(self, data: bytes) -> None:
        if self._text is None:
            if self.writer is not None:
                await self.writer.write(data)
            return
        self._held += len(data)
        if self._held > self._limits.fields:
            raise TooLargeError(
                f"the text fields of the form have more than {self._limits.fields} bytes",
                remedy="shorten the description in the metadata",
            )
        self._text.append(data)

    async def _close(self) -> None:
        if self._name == SIGNATURE:
            return
        if self._text is not None:
            try:
                text = b"".join(self._text).decode()
            except UnicodeDecodeError:
                raise RefusedError(f"the field {self._name} is not UTF-8", remedy="send text as UTF-8") from None
            self.form.fields.setdefault(self._name, []).append(text)
        elif self.writer is not None:
            await self.writer.finish()


async def receive_form(
    content_type: str, length: int | None, receive: Receive, store: Store, limits: Limits, executor: Executor
) -> Form:
    """Receive a whole form. A failure leaves nothing in staging.

    Raises:
        RefusedError: it is not a form, is malformed, ends before its last boundary, or the client disconnected.
        TooLargeError, StalledError, StoreFullError: see the classes.
    """
    try:
        kind, options = parse_options_header(content_type)
    except (UnicodeError, LookupError, ValueError):
        raise RefusedError("the Content-Type is malformed", remedy="use twine, uv publish or curl -F") from None
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise RefusedError("the upload is not multipart/form-data", remedy="use twine, uv publish or curl -F")
    if len(options[b"boundary"]) > 70:
        raise RefusedError(
            "the boundary is longer than 70 characters", remedy="send a boundary of at most 70 characters (RFC 2046, 5.1.1)"
        )
    _check_size(length or 0, limits)
    form = Form()
    reader = _Reader(options[b"boundary"])
    assembler = _Assembler(form, store, limits, executor)
    try:
        await _pump(length, receive, limits, reader, assembler)
    except BaseException:
        if assembler.writer is not None:
            await assembler.writer.close()
        form.discard()
        raise
    return form


async def _pump(length: int | None, receive: Receive, limits: Limits, reader: _Reader, assembler: _Assembler) -> None:
    start, count = time.monotonic(), 0
    async for piece in pieces(receive, limits):
        count += len(piece)
        _check_size(count, limits)
        elapsed = time.monotonic() - start
        if elapsed > limits.idle and count < limits.slowest * elapsed:
            raise StalledError(
                f"the upload was slower than {limits.slowest} bytes per second", remedy="try again with a faster connection"
            )
        for kind, data in reader.feed(piece):
            await assembler.take(kind, data)
    if not reader.ended or (length is not None and count != length):
        raise RefusedError(
            "the upload ended before its last boundary", remedy="upload the file again, since the connection was interrupted"
        )


def _check_size(size: int, limits: Limits) -> None:
    if size > limits.upload:
        raise TooLargeError(
            f"uploads may have at most {limits.upload} bytes",
            remedy="split the distribution; or start `index serve` with a larger --max-upload",
        )


async def pieces(receive: Receive, limits: Limits) -> AsyncIterator[bytes]:
    """The chunks of a request's body.

    Raises:
        StalledError: no data arrived in time.
        RefusedError: the client disconnected.
    """
    more = True
    while more:
        try:
            async with asyncio.timeout(limits.idle):
                message = await receive()
        except TimeoutError:
            raise StalledError(
                f"no data arrived for {limits.idle:g} seconds", remedy="try again with a faster connection"
            ) from None
        if message["type"] == "http.disconnect":
            raise RefusedError("the client disconnected before the end of the upload", remedy="upload the file again")
        yield message.get("body", b"")
        more = message.get("more_body", False)
