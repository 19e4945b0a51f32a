"""Entries of a compiler cache that several machines share: signed when they are written, checked before they are used.

An entry's key is a hash of everything that it was made from, so a writer can put a wrong object behind a right key.
Therefore a machine takes only what a key that it trusts has signed. The signature covers kind, recipe, key and the sha256 of
the bytes, so that no entry can take another's place. `index serve` keeps them at /cache/KIND/RECIPE/KEY.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import threading
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Literal

import httpx
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import Field

from builder.planning.settings import Settings
from builder.proof import signing
from gracefarm.errors import ConfigError
from gracefarm.process import first_line
from gracefarm.tables import Table

Mode = Literal["off", "read", "write"]
MODES: tuple[Mode, ...] = ("off", "read", "write")
KIND = "application/vnd.gracefarm.cache-entry"
"What is signed, as DSSE calls it."
TOKEN = "GRACEFARM_CACHE_TOKEN"  # noqa: S105 - the name of a variable
"The index's token of a machine that writes; only in the environment."
FAILURES = 3
"Reads or writes that may fail one after the other. Then the compile goes on without them."
TIMEOUT = httpx.Timeout(20.0, connect=5.0)
FLUSH = 60.0
"Seconds that the end of a compile waits for what is still being sent."
WRITERS = 2
NAMED = 10
"Refused entries that the record names."


class SharedCacheUse(Table):
    """What the shared cache did in one compile; counts are entries, of which a translation unit has one or two."""

    url: str = Field(description="Address of the index")
    mode: Mode = Field(description="As --shared-cache named it")
    hits: int = Field(default=0, description="Entries that were taken")
    misses: int = Field(default=0, description="Entries that were absent or refused")
    written: int = Field(default=0, description="Entries that were sent")
    refused: tuple[str, ...] = Field(default=(), description="Entries that were there and not taken, each with the reason")
    off: str = Field(default="", description="Why reading or writing was given up during the compile")

    @property
    def title(self) -> str:
        """One line for console and log."""
        refused = f", {len(self.refused)} refused: {self.refused[0]}" if self.refused else ""
        off = f"; given up: {self.off}" if self.off else ""
        counts = f"{self.hits} entries taken, {self.misses} not there, {self.written} written"
        return f"shared cache {self.url}: {counts}{refused}{off}"


@dataclass(kw_only=True)
class SharedCache:
    """The entries of one recipe on an index, for one compile. Every method may be called by several threads."""

    url: str
    recipe: str
    mode: Mode
    trusted: Mapping[str, Ed25519PublicKey]
    "By key id."
    key: Ed25519PrivateKey | None = None
    token: str = ""
    _use: SharedCacheUse = field(init=False)
    _client: httpx.Client = field(init=False)
    _writers: ThreadPoolExecutor = field(init=False)
    _sent: list[Future[None]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _failures: Counter[str] = field(default_factory=Counter)
    "By method, since the last success."

    def __post_init__(self) -> None:
        self._use = SharedCacheUse(url=self.url, mode=self.mode)
        self._client = httpx.Client(timeout=TIMEOUT, auth=("__token__", self.token) if self.token else None)
        self._writers = ThreadPoolExecutor(WRITERS, thread_name_prefix="shared-cache")

    @property
    def use(self) -> SharedCacheUse:
        """What it has done so far."""
        with self._lock:
            return self._use

    def get(self, kind: str, key: str) -> bytes | None:
        """The bytes of an entry; None where there is none that this machine trusts."""
        answer = self._ask("GET", kind, key)
        if answer is None or answer.status_code == 404:
            self._count(misses=1)
            return None
        content, reason = self._checked(kind, key, answer.content)
        if content is None:
            self._count(misses=1, refused=f"{kind}/{self.recipe}/{key[:16]}: {reason}")
        else:
            self._count(hits=1)
        return content

    def put(self, kind: str, key: str, content: bytes) -> bool:
        """Send an entry, in the background; False: this machine only reads."""
        if self.mode != "write" or self.key is None:
            return False
        sha256 = hashlib.sha256(content).hexdigest()
        signature = base64.b64encode(self.key.sign(self._signed(kind, key, sha256))).decode()
        header = {"sha256": sha256, "keyid": signing.key_id(self.key.public_key()), "sig": signature}
        entry = json.dumps(header).encode() + b"\n" + content
        with self._lock:
            self._sent.append(self._writers.submit(self._write, kind, key, entry))
        return True

    def close(self) -> SharedCacheUse:
        """Wait a while for what is being sent; what the cache did."""
        wait(self._sent, timeout=FLUSH)
        self._writers.shutdown(wait=False, cancel_futures=True)
        self._client.close()
        return self.use

    def _write(self, kind: str, key: str, entry: bytes) -> None:
        answer = self._ask("PUT", kind, key, entry)
        if answer is not None:
            self._count(written=1)

    def _ask(self, method: str, kind: str, key: str, content: bytes | None = None) -> httpx.Response | None:
        """The answer, a good one or 404; None: there is none, or no more is asked for."""
        if self._failures[method] >= FAILURES:
            return None
        try:
            answer = self._client.request(method, f"{self.url}/cache/{kind}/{self.recipe}/{key}", content=content)
        except (httpx.HTTPError, RuntimeError) as error:  # httpx raises RuntimeError after `close`
            self._fail(method, str(error) or type(error).__name__)
            return None
        if answer.is_success or answer.status_code == 404:
            with self._lock:
                self._failures[method] = 0
            return answer
        self._fail(method, f"{answer.status_code} {first_line(answer.text, answer.reason_phrase)[:200]}")
        return None

    def _fail(self, method: str, reason: str) -> None:
        with self._lock:
            self._failures[method] += 1
            if self._failures[method] == FAILURES:
                what = f"{'reading' if method == 'GET' else 'writing'}: {reason}"
                self._use = self._use.model_copy(update={"off": "; ".join(filter(None, (self._use.off, what)))})

    def _count(self, *, hits: int = 0, misses: int = 0, written: int = 0, refused: str = "") -> None:
        with self._lock:
            use = self._use
            named = (*use.refused, refused) if refused and len(use.refused) < NAMED else use.refused
            counts = {"hits": use.hits + hits, "misses": use.misses + misses, "written": use.written + written}
            self._use = use.model_copy(update={**counts, "refused": named})

    def _signed(self, kind: str, key: str, sha256: str) -> bytes:
        return signing.encoding(KIND, f"{kind}/{self.recipe}/{key} {sha256}".encode())

    def _checked(self, kind: str, key: str, entry: bytes) -> tuple[bytes | None, str]:
        """The bytes of an entry, or None and why this machine does not take them."""
        line, _, content = entry.partition(b"\n")
        try:
            header = json.loads(line)
            sha256, writer = str(header["sha256"]), str(header["keyid"])
            signature = base64.b64decode(header["sig"], validate=True)
        except (ValueError, KeyError, TypeError, binascii.Error, RecursionError):
            return None, "it is damaged"
        public = self.trusted.get(writer)
        if public is None:
            return None, f"this machine does not trust its writer, key {writer[:16]}"
        try:
            public.verify(signature, self._signed(kind, key, sha256))
        except InvalidSignature:
            return None, f"the signature of key {writer[:16]} is wrong"
        return (
            (content, "")
            if hashlib.sha256(content).hexdigest() == sha256
            else (None, "its bytes are not those that were signed")
        )


def opened(settings: Settings, recipe: str, mode: Mode) -> SharedCache | None:
    """The shared cache of this machine for a recipe; None: there is no shared cache, or it is off.

    Raises:
        ConfigError: see `check`; or a trusted key cannot be read.
    """
    check(settings, mode)
    if mode == "off" or settings.shared_cache is None:
        return None
    own, token = signing.private(), os.environ.get(TOKEN, "")
    keys = [signing.public(place) for place in settings.shared_cache_keys]
    keys += [own.public_key()] if own is not None else []
    return SharedCache(
        url=settings.shared_cache.rstrip("/"),
        recipe=recipe,
        mode=mode,
        trusted={signing.key_id(key): key for key in keys},
        key=own if mode == "write" else None,
        token=token if mode == "write" else "",
    )


def check(settings: Settings, mode: Mode) -> None:
    """Has this machine what writing needs?

    Raises:
        ConfigError: it has not, and shall write.
    """
    if mode != "write":
        return
    for there, what, remedy in (
        (settings.shared_cache, "the address of an index", "set GRACEFARM_SHARED_CACHE to it"),
        (signing.private(), "the farm's key, which signs the entries", "make it: builder key create"),
        (
            os.environ.get(TOKEN),
            f"a token of the index in {TOKEN}",
            "make one there: index token create --name MACHINE --cache",
        ),
    ):
        if not there:
            raise ConfigError(f"--shared-cache write needs {what}", remedy=remedy)
