"""Entries of a compiler cache and of a device store that several machines share: signed when written, checked before use.

The key of an entry is a hash of its inputs, not of its bytes, so a writer could store a wrong object under a correct key.
Therefore a machine uses only entries that a trusted key has signed. The signature covers kind, recipe, key and the sha256 of
the bytes, so that an entry cannot replace another one. `index serve` keeps entries at /cache/KIND/RECIPE/KEY.
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

from builder.planning.settings import Settings
from builder.proof import signing
from gracefarm.errors import ConfigError
from gracefarm.process import first_line
from gracefarm.tables import Table

Mode = Literal["off", "read", "write"]
MODES: tuple[Mode, ...] = ("off", "read", "write")
KIND = "application/vnd.gracefarm.cache-entry"
"Type of the signed content in DSSE."
_OTHERS = (
    "run `builder key show` on the machine that writes to the cache, and name a file with its output in shared_cache_keys"
)
"How to get a key of shared_cache_keys."
TOKEN = "GRACEFARM_CACHE_TOKEN"  # noqa: S105 - the name of a variable
"Variable with the token for writing to the index."
FAILURES = 3
"Number of failures in a row after which the compile continues without reading or writing."
TIMEOUT = httpx.Timeout(20.0, connect=5.0)
FLUSH = 60.0
"Seconds to wait at the end of a compile for entries that are being sent."
WRITERS = 2
NAMED = 10
"Number of refused entries that the record names."


class SharedCacheUse(Table):
    """Use of the shared cache on an index. The numbers count entries. A source file has one or two entries in the compiler
    cache. In the device store, a run of cicc has two or three entries, and a run of ptxas has one."""

    url: str
    "URL of the index"
    mode: Mode
    "Value of the option `--shared-cache`"
    hits: int = 0
    "Entries of the compiler cache that the build used"
    misses: int = 0
    "Entries of the compiler cache that the index did not have, or that the builder refused (see `refused`)"
    written: int = 0
    "Entries of the compiler cache that the build uploaded"
    device_hits: int = 0
    "Entries of the device store that the build used"
    device_misses: int = 0
    "Entries of the device store that the index did not have, or that the builder refused (see `refused`)"
    device_written: int = 0
    "Entries of the device store that the build uploaded"
    refused: tuple[str, ...] = ()
    "Names of the entries that the builder refused, each with the reason. At most 10 are listed"
    off: str = ""
    "Error after which the build stopped reading or writing entries. Empty: no such error"

    def stopped(self, what: str) -> SharedCacheUse:
        """The use, with an error after which the build did not use the cache."""
        return self.model_copy(update={"off": "; ".join(filter(None, (self.off, what)))})

    @property
    def used(self) -> bool:
        """Whether the compile requested or sent an entry."""
        return self._compiler or self._device or bool(self.off)

    @property
    def title(self) -> str:
        """The use in one line, for console and log."""
        refused = f", {len(self.refused)} refused: {self.refused[0]}" if self.refused else ""
        off = f"; stopped {self.off}" if self.off else ""
        counts = f"{self.hits} entries used, {self.misses} missing, {self.written} written"
        device = f"{self.device_hits} entries used, {self.device_misses} missing, {self.device_written} written"
        parts = [counts] if self._compiler or not self._device else []
        parts += [f"device code: {device}"] if self._device else []
        return f"shared cache {self.url}: {'; '.join(parts)}{refused}{off}"

    @property
    def _compiler(self) -> bool:
        return bool(self.hits or self.misses or self.written)

    @property
    def _device(self) -> bool:
        return bool(self.device_hits or self.device_misses or self.device_written)


@dataclass(kw_only=True)
class SharedCache:
    """The entries of one recipe on an index, for one compile. All methods are thread-safe."""

    url: str
    recipe: str
    mode: Mode
    trusted: Mapping[str, Ed25519PublicKey]
    "Trusted keys by key id."
    key: Ed25519PrivateKey | None = None
    token: str = ""
    _use: SharedCacheUse = field(init=False)
    _client: httpx.Client = field(init=False)
    _writers: ThreadPoolExecutor = field(init=False)
    _sent: list[Future[None]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _failures: Counter[str] = field(default_factory=Counter)
    "Failures since the last success, by HTTP method."

    def __post_init__(self) -> None:
        self._use = SharedCacheUse(url=self.url, mode=self.mode)
        self._client = httpx.Client(timeout=TIMEOUT, auth=("__token__", self.token) if self.token else None)
        self._writers = ThreadPoolExecutor(WRITERS, thread_name_prefix="shared-cache")

    @property
    def use(self) -> SharedCacheUse:
        """The use so far."""
        with self._lock:
            return self._use

    def get(self, kind: str, key: str) -> bytes | None:
        """The bytes of an entry; None if there is no trusted entry."""
        answer = self._ask("GET", kind, key)
        if answer is None or answer.status_code == 404:
            self._count(kind, "misses")
            return None
        content, reason = self._checked(kind, key, answer.content)
        if content is None:
            self._count(kind, "misses", f"{kind}/{self.recipe}/{key[:16]}: {reason}")
        else:
            self._count(kind, "hits")
        return content

    def put(self, kind: str, key: str, content: bytes) -> bool:
        """Send an entry in the background; False: this machine only reads."""
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
        """Wait up to FLUSH seconds for entries that are being sent; return the use."""
        wait(self._sent, timeout=FLUSH)
        self._writers.shutdown(wait=False, cancel_futures=True)
        self._client.close()
        return self.use

    def _write(self, kind: str, key: str, entry: bytes) -> None:
        answer = self._ask("PUT", kind, key, entry)
        if answer is not None:
            self._count(kind, "written")

    def _ask(self, method: str, kind: str, key: str, content: bytes | None = None) -> httpx.Response | None:
        """The answer, if it is a success or 404; None: there was no answer, or requests are stopped."""
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
                self._use = self._use.stopped(what)

    def _count(self, kind: str, what: str, refused: str = "") -> None:
        """Add one to `what`, which is hits, misses or written."""
        name = f"device_{what}" if kind == "device" else what
        with self._lock:
            use = self._use
            named = (*use.refused, refused) if refused and len(use.refused) < NAMED else use.refused
            self._use = use.model_copy(update={name: getattr(use, name) + 1, "refused": named})

    def _signed(self, kind: str, key: str, sha256: str) -> bytes:
        return signing.encoding(KIND, f"{kind}/{self.recipe}/{key} {sha256}".encode())

    def _checked(self, kind: str, key: str, entry: bytes) -> tuple[bytes | None, str]:
        """The bytes of an entry; or None, and why it is refused."""
        line, _, content = entry.partition(b"\n")
        try:
            header = json.loads(line)
            sha256, writer = str(header["sha256"]), str(header["keyid"])
            signature = base64.b64decode(header["sig"], validate=True)
        except (ValueError, KeyError, TypeError, binascii.Error, RecursionError):
            return None, "the entry is damaged"
        public = self.trusted.get(writer)
        if public is None:
            return None, f"this machine does not trust the key {writer[:16]}, which signed the entry"
        try:
            public.verify(signature, self._signed(kind, key, sha256))
        except InvalidSignature:
            return None, f"the signature of key {writer[:16]} is wrong"
        return (
            (content, "")
            if hashlib.sha256(content).hexdigest() == sha256
            else (None, "the bytes of the entry differ from the signed bytes")
        )


def opened(settings: Settings, recipe: str, mode: Mode) -> SharedCache | None:
    """The shared cache of this machine for a recipe; None: it is not configured, or off.

    Raises:
        ConfigError: see `check`; or a trusted key cannot be read.
    """
    check(settings, mode)
    if mode == "off" or settings.shared_cache is None:
        return None
    own, token = signing.private(), os.environ.get(TOKEN, "")
    keys = [signing.public(place, _OTHERS) for place in settings.shared_cache_keys]
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
    """Check that this machine has everything that writing requires.

    Raises:
        ConfigError: the mode is `write`, and something is missing.
    """
    if mode != "write":
        return
    for there, what, remedy in (
        (settings.shared_cache, "the URL of an index", "set GRACEFARM_SHARED_CACHE to the URL of the index"),
        (signing.private(), "this machine's signing key, which signs the entries", "create the key with `builder key create`"),
        (
            os.environ.get(TOKEN),
            f"a token of the index in {TOKEN}",
            f"set {TOKEN} to a token that `index token create --name MACHINE --cache` creates on the machine of the index",
        ),
    ):
        if not there:
            raise ConfigError(f"--shared-cache write requires {what}", remedy=remedy)
