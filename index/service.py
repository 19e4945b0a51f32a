"""What the handlers of one server share."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from index import htpasswd
from index.catalogue import Catalogue
from index.errors import StoreFullError
from index.limits import Gate, Limits
from index.metrics import Metrics
from index.shelf import Shelf
from index.store import Store

HEADROOM = 16 << 20
"Bytes that an upload must leave free, for the catalogue."


@dataclass(frozen=True, kw_only=True)
class Options:
    """How `index serve` was asked to behave."""

    allow_new: bool = False
    limits: Limits = field(default_factory=Limits)
    trusted_proxies: frozenset[str] = frozenset()
    base_url: str | None = None
    "What the pages for people print as the address; None: what the browser asked for."
    static: bool = False
    "Pages for an export: without the forms that only a running server can answer."
    access_log: str | None = None
    "A path, `-` for stdout, None for none."


@dataclass(kw_only=True)
class Service:
    """One index, being served."""

    store: Store
    catalogue: Catalogue
    shelf: Shelf
    options: Options
    gate: Gate
    metrics: Metrics = field(default_factory=Metrics)
    passwords: htpasswd.Memory = field(default_factory=htpasswd.Memory)
    hands: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(4, thread_name_prefix="hands"))
    "Hash, write and read archives."
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

    def close(self) -> None:
        """Let the threads end and the connections close."""
        self.hands.shutdown()
        self.writer.shutdown()
        self.catalogue.close()
