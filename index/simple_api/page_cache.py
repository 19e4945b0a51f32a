"""Cache of rendered pages: rendered once per change, compressed once per coding, kept in memory up to a limit.

The cost of a page does not depend on the size of the index. SQLite's data_version reveals a change by any process on the same
folder. Then only the pages of the changed projects are dropped.

Four caches depend on the catalogue; each is invalidated when its part of the catalogue changes:
- `PageCache._pages`, here: bytes of the simple API's pages. A change of a project drops its pages and the lists of projects. A
  change of a set drops all pages. Above `bound`, the least recently used pages are dropped.
- `Front._answers` (serving/front.py): whole responses with those pages. All are dropped when `PageCache.generation` grows.
- `IndexService.answer_cache` (serving/service.py): web pages and /packages/. All are dropped when `PageCache.generation`
  grows.
- `ProjectPages._cached_rows` (web/projects.py): rows of the first web page. A row is dropped when its project's serial grows.
"""

from __future__ import annotations

import gzip
import hashlib
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field

import zstandard

from index.simple_api.negotiate import Encoding, Format
from index.simple_api.pages import render
from index.simple_api.views import View
from index.store.catalogue import Catalogue

POLL = 0.002
"Seconds between two checks of data_version: shorter than the time between another process's commit and its exit."

_SMALLEST = 200
"Bytes below which compression makes a page larger."


@dataclass
class Page:
    """One page in one format, compressed on demand."""

    plain: bytes
    digest: str = ""
    _codings: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.digest = hashlib.sha256(self.plain).hexdigest()[:32]

    def body(self, encoding: Encoding) -> bytes:
        """The bytes in that coding."""
        if not encoding or len(self.plain) < _SMALLEST:
            return self.plain
        body = self._codings.get(encoding)
        if body is None:
            body = self._codings[encoding] = _encode(self.plain, encoding)
        return body

    def coding(self, encoding: Encoding) -> Encoding:
        """The coding that `body` actually uses."""
        return encoding if len(self.plain) >= _SMALLEST else ""

    def etag(self, encoding: Encoding) -> str:
        """A strong ETag, so each coding has another one (RFC 9110 8.8.3.3)."""
        return f'"{self.digest}{"-" + encoding if self.coding(encoding) else ""}"'

    @property
    def weight(self) -> int:
        """Bytes in memory."""
        return len(self.plain) + sum(map(len, self._codings.values())) + 512


def _encode(plain: bytes, encoding: Encoding) -> bytes:
    if encoding == "zstd":
        return zstandard.ZstdCompressor(level=9).compress(plain)
    return gzip.compress(plain, compresslevel=6 if len(plain) > 1 << 20 else 9, mtime=0)


class PageCache:
    """The cached pages of one catalogue. Safe to use from several threads."""

    def __init__(self, catalogue: Catalogue, *, bound: int = 256 << 20, base_url: str | None = None) -> None:
        self.catalogue = catalogue
        self.bound = bound
        self.base_url = base_url
        "The address of the index, if it is known."
        self.generation = 0
        "Grows whenever pages are dropped. Other caches that depend on pages then drop their entries."
        self._pages: OrderedDict[tuple[tuple[str, ...], str, Format], Page] = OrderedDict()
        self._lock = threading.RLock()
        self._version = -1
        self._serial = catalogue.serial()
        self._looked = 0.0

    def refresh(self, *, now: bool = False) -> int:
        """Drop changed pages and return the generation. Without `now`, check at most once in POLL seconds."""
        moment = time.monotonic()
        if not now and moment - self._looked < POLL:
            return self.generation
        self._looked = moment
        with self._lock:
            version = self.catalogue.version()
            serial = self._serial
            if now or version != self._version:
                self._version = version
                serial = self.catalogue.serial()
            if serial != self._serial:
                self._drop(serial)
        return self.generation

    def _drop(self, serial: int) -> None:
        changed = {row["name"] for row in self.catalogue.rows("SELECT name FROM project WHERE serial > ?", (self._serial,))}
        sets = self.catalogue.row(
            "SELECT 1 FROM audit WHERE serial > ? AND action LIKE 'set.%' AND action <> 'set.create' LIMIT 1", (self._serial,)
        )
        for key in list(self._pages):
            if sets or key[1] in changed or (key[1] == "" and changed):
                del self._pages[key]
        self._serial = serial
        self.generation += 1

    def page(self, view: View, project: str, form: Format) -> Page:
        """The project's page in the view, or the list of projects for "".

        Raises:
            NotFoundError: the view has no project of that name.
        """
        key = (view.prefix, project, form)
        with self._lock:
            page = self._pages.get(key)
            if page is not None:
                self._pages.move_to_end(key)
                return page
            generation = self.generation
        page = Page(render(self.catalogue, view, project, form, self.base_url))
        with self._lock:
            if generation == self.generation:
                self._pages[key] = page
                self._trim()
        return page

    def _trim(self) -> None:
        weight = sum(page.weight for page in self._pages.values()) if len(self._pages) % 64 == 0 else 0
        while weight > self.bound and self._pages:
            _, dropped = self._pages.popitem(last=False)
            weight -= dropped.weight
            self.generation += 1  # responses made from it would keep its bytes in memory
