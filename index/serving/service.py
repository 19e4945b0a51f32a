"""The state that the handlers of one server share."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from starlette.responses import Response

from index.errors import StoreFullError
from index.limits import ClientGate, Limits
from index.serving.download import Downloads
from index.serving.metrics import ServerMetrics
from index.serving.proxies import Proxies
from index.simple_api.page_cache import PageCache
from index.store import htpasswd
from index.store.catalogue import Catalogue
from index.store.files import Store
from index.trust.attestations import AttestationVerifier
from index.trust.identity import IssuerKeys

HEADROOM = 16 << 20
"Bytes that an upload must leave free for the catalogue."


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Options of `index serve`."""

    allow_new: bool = False
    variants: bool = False
    "Accept variant wheels (PEP 825, a draft)."
    limits: Limits = field(default_factory=Limits)
    trusted_proxies: Proxies = field(default_factory=Proxies)
    base_url: str | None = None
    "The address of the index: web pages print it, and provenance URLs start with it. None: use the address of the request."
    sigstore_offline: bool = False
    "Verify attestations with the Sigstore keys on this machine; do not fetch newer ones."
    cache_size: int = 20 << 30
    "Maximum bytes of the shared compiler cache; 0: there is no cache."
    access_log: str | None = None
    "A path, `-` for stdout, or None for no log."


@dataclass
class AnswerCache:
    """Caches responses that depend on the whole store until it changes. Used from the event loop only."""

    bound: int = 32 << 20
    _answers: dict[tuple[str, str], Response] = field(default_factory=dict)
    _weight: int = 0
    _generation: int = -1

    def get(self, generation: int, key: tuple[str, str] | None) -> Response | None:
        """The cached response of this generation, if there is one."""
        if generation != self._generation:
            self._answers.clear()
            self._weight, self._generation = 0, generation
        return self._answers.get(key) if key is not None else None

    def put(self, generation: int, key: tuple[str, str] | None, answer: Response) -> None:
        """Cache a complete response, unless the store has changed since the request."""
        weight = len(answer.body) + 1024
        if key is None or answer.status_code != 200 or generation != self._generation or weight > self.bound:
            return
        if self._weight + weight > self.bound:
            self._answers.clear()
            self._weight = 0
        self._answers[key] = answer
        self._weight += weight


@dataclass(kw_only=True)
class IndexService:
    """One index while it is served."""

    store: Store
    catalogue: Catalogue
    page_cache: PageCache
    options: ServeOptions
    gate: ClientGate
    metrics: ServerMetrics = field(default_factory=ServerMetrics)
    downloads: Downloads = field(default_factory=Downloads)
    passwords: htpasswd.PasswordMemory = field(default_factory=htpasswd.PasswordMemory)
    issuer_keys: IssuerKeys = field(default_factory=IssuerKeys)
    attestations: AttestationVerifier = field(default_factory=AttestationVerifier)
    workers: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(4, thread_name_prefix="workers"))
    "Threads that hash, write and read archives."
    exchanger: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(4, thread_name_prefix="exchanger"))
    "Threads that exchange identity tokens. Any client may send a token of a slow issuer; it must not delay uploads."
    verifier: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="verifier"))
    "Thread that verifies attestations, one at a time; it may wait for Sigstore's keys."
    answer_cache: AnswerCache = field(default_factory=AnswerCache)
    web_thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="web_thread"))
    "Thread that renders the web pages, one at a time."
    writer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="writer"))
    "Thread that commits, one transaction at a time."

    @property
    def limits(self) -> Limits:
        """Limits for clients."""
        return self.options.limits

    def check_space(self, size: int) -> None:
        """Refuse an upload that cannot fit before its body is sent.

        Raises:
            StoreFullError: the disk has fewer free bytes than the client announced.
        """
        if shutil.disk_usage(self.store.root).free < size + HEADROOM:
            raise StoreFullError("the disk of the index is full", remedy="free space on it, then upload again")

    async def rendered(self, key: tuple[str, str] | None, make: Callable[[], Response]) -> Response:
        """Run `make` in the page thread: a page of the whole store must not delay the pages of installers.

        With a `key`, the response is cached until the store changes.
        """
        generation = self.page_cache.refresh()
        if (cached := self.answer_cache.get(generation, key)) is not None:
            return cached
        answer = await asyncio.get_running_loop().run_in_executor(self.web_thread, make)
        self.answer_cache.put(generation, key, answer)
        return answer

    def close(self) -> None:
        """Stop the threads and close the connections."""
        self.web_thread.shutdown()
        self.exchanger.shutdown()
        self.verifier.shutdown()
        self.workers.shutdown()
        self.writer.shutdown()
        self.catalogue.close()
