"""What the handlers of one server share."""

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
"Bytes that an upload must leave free, for the catalogue."


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """How `index serve` was asked to behave."""

    allow_new: bool = False
    variants: bool = False
    "Uploads may be variant wheels (PEP 825, a draft)."
    limits: Limits = field(default_factory=Limits)
    trusted_proxies: Proxies = field(default_factory=Proxies)
    base_url: str | None = None
    "The index's own address: what the pages print, and where provenance is. None: what the browser asked for."
    sigstore_offline: bool = False
    "Verify attestations with the keys of Sigstore that are on this machine, and ask for no newer ones."
    access_log: str | None = None
    "A path, `-` for stdout, None for none."


@dataclass
class AnswerCache:
    """Answers made from the whole store, as long as it does not change. Used from the event loop only."""

    bound: int = 32 << 20
    _answers: dict[tuple[str, str], Response] = field(default_factory=dict)
    _weight: int = 0
    _generation: int = -1

    def get(self, generation: int, key: tuple[str, str] | None) -> Response | None:
        """The answer of this generation, if it is here."""
        if generation != self._generation:
            self._answers.clear()
            self._weight, self._generation = 0, generation
        return self._answers.get(key) if key is not None else None

    def put(self, generation: int, key: tuple[str, str] | None, answer: Response) -> None:
        """Keep a whole answer, unless the store has changed since it was asked for."""
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
    """One index, being served."""

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
    "Hash, write and read archives."
    exchanger: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(4, thread_name_prefix="exchanger"))
    "Exchanges identity tokens: one that names a slow issuer, which anybody may send, must not hold up uploads."
    verifier: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="verifier"))
    "Verifies attestations, one at a time: it may wait for Sigstore's keys."
    answer_cache: AnswerCache = field(default_factory=AnswerCache)
    web_thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="web_thread"))
    "Renders the pages for people, one at a time."
    writer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="writer"))
    "Commits, one after the other."

    @property
    def limits(self) -> Limits:
        """Bounds on what clients may take."""
        return self.options.limits

    def check_space(self, size: int) -> None:
        """Refuse what cannot fit before it is sent.

        Raises:
            StoreFullError: fewer bytes are free than announced.
        """
        if shutil.disk_usage(self.store.root).free < size + HEADROOM:
            raise StoreFullError("the index's disk is full", remedy="free space on it, then upload again")

    async def rendered(self, key: tuple[str, str] | None, make: Callable[[], Response]) -> Response:
        """What `make` answers, made in a thread of its own: a page of the whole store must not hold up installers' pages.

        With a `key`, the answer is kept until anything changes.
        """
        generation = self.page_cache.refresh()
        if (cached := self.answer_cache.get(generation, key)) is not None:
            return cached
        answer = await asyncio.get_running_loop().run_in_executor(self.web_thread, make)
        self.answer_cache.put(generation, key, answer)
        return answer

    def close(self) -> None:
        """Let the threads end and the connections close."""
        self.web_thread.shutdown()
        self.exchanger.shutdown()
        self.verifier.shutdown()
        self.workers.shutdown()
        self.writer.shutdown()
        self.catalogue.close()
