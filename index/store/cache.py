"""The shared compiler cache: ROOT/cache/KIND/RECIPE/ab/KEY, each entry with its sha256 and its writer's signature.

An entry is a line of JSON (`sha256` of the rest, `keyid` and `sig` of its writer) and the bytes. The index checks the sha256
when an entry comes. The machines that read decide whose signature counts (docs/explanation/building.md, "Shared cache").
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from contextlib import suppress
from pathlib import Path

from gracefarm.files import atomic_write
from index.errors import NotFoundError, RefusedError, TooLargeError
from index.store.files import Store, disk_errors

KINDS = ("ccache", "device")
MAX_ENTRY = 64 << 20
"Bytes of one entry."
_RECIPE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}\Z")
_KEY = re.compile(r"[0-9a-f]{16,128}\Z")
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")
_HEADER = 4096
"Bytes of the line of JSON."


class EntryStore:
    """Entries up to `limit` bytes together; of more, those that were not read for the longest time go."""

    def __init__(self, store: Store, limit: int) -> None:
        self._root = store.root / "cache"
        self._limit = limit
        self._total: int | None = None
        "Bytes; None: not counted yet."

    def path(self, kind: str, recipe: str, key: str) -> Path:
        """Where an entry is.

        Raises:
            NotFoundError: no entry can have that name, or the index keeps none.
        """
        if not self._limit or kind not in KINDS or not _RECIPE.match(recipe) or not _KEY.match(key):
            raise NotFoundError("there is no such cache entry", remedy="use an address of the form /cache/KIND/RECIPE/KEY")
        return self._root / kind / recipe / key[:2] / key

    def read(self, kind: str, recipe: str, key: str) -> bytes:
        """An entry as it came.

        Raises:
            NotFoundError: there is none.
        """
        path = self.path(kind, recipe, key)
        try:
            content = path.read_bytes()
            os.utime(path)
        except FileNotFoundError:
            raise NotFoundError("there is no such cache entry", remedy="compile the object") from None
        return content

    def keep(self, kind: str, recipe: str, key: str, entry: bytes) -> None:
        """Keep an entry, in place of one with the same key. One thread at a time calls this.

        Raises:
            NotFoundError: see `path`.
            RefusedError: it is not an entry, or is damaged.
        """
        path = self.path(kind, recipe, key)
        _check(entry)
        if self._total is None:
            self._total = sum(size for _, size, _ in self._entries())
        with suppress(FileNotFoundError):
            self._total -= path.stat().st_size
        with disk_errors(self._root):
            atomic_write(path, entry)
        self._total += len(entry)
        if self._total > self._limit:
            self._trim()

    def _entries(self) -> list[tuple[float, int, Path]]:
        entries = []
        for path in self._root.glob("*/*/*/*"):
            with suppress(FileNotFoundError):
                status = path.stat()
                entries.append((status.st_mtime, status.st_size, path))
        return entries

    def _trim(self) -> None:
        """Down to nine tenths, so that not every entry after it walks through all."""
        entries = sorted(self._entries())
        total = sum(size for _, size, _ in entries)
        for _, size, path in entries:
            if total <= self._limit * 9 // 10:
                break
            path.unlink(missing_ok=True)
            total -= size
        self._total = total


def _check(entry: bytes) -> None:
    if len(entry) > MAX_ENTRY:
        raise TooLargeError(
            f"cache entries of more than {MAX_ENTRY} bytes are refused", remedy="compile the object on each machine"
        )
    line, newline, body = entry.partition(b"\n")
    try:
        header = json.loads(line) if newline and len(line) <= _HEADER else None
    except (ValueError, RecursionError):
        header = None
    known = isinstance(header, dict) and all(isinstance(header.get(name), str) for name in ("sha256", "keyid", "sig"))
    if not known or not isinstance(header, dict) or not _SHA256.match(header["sha256"]):
        raise RefusedError(
            "a cache entry must begin with a line of JSON with sha256, keyid and sig",
            remedy="write the entry with `builder build`",
        )
    if hashlib.sha256(body).hexdigest() != header["sha256"]:
        raise RefusedError("the sha256 of the cache entry does not match its bytes", remedy="send the entry again")
