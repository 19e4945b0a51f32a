"""Export a static tree for nginx or an object store: the same bytes as the live pages; only changed files are written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata, resources
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from gracefarm.console import Tick, no_tick
from gracefarm.errors import ConfigError
from gracefarm.files import atomic_write, sync_directory
from index.errors import DamagedError, NotFoundError
from index.sets import pylock, staged
from index.simple_api import requirements, views
from index.simple_api.negotiate import Encoding, Format
from index.simple_api.page_cache import Page
from index.simple_api.pages import render
from index.simple_api.views import Listed, View
from index.store import variants
from index.store.catalogue import Catalogue
from index.store.files import Store, disk_errors
from index.store.provenance import SUFFIX
from index.web import board, builds, choose, projects, wheel
from index.web.routes import static_files
from index.web.sets import sets
from index.web.site import POLICY, Site

MANIFEST = ".gracefarm-export.json"
_STATE = ""
"Key of the manifest that is not a path: the sources of the export."

_SUFFIXES: tuple[tuple[str, Encoding], ...] = (("", ""), (".gz", "gzip"), (".zst", "zstd"))


@dataclass
class Exported:
    """Result of an export."""

    written: int = 0
    kept: int = 0
    removed: int = 0


def export_tree(store: Store, catalogue: Catalogue, target: Path, tick: Tick = no_tick, *, url: str | None = None) -> Exported:
    """Update `target`. Files are written before the pages that link to them, and removed last, so links never break.

    The web pages print `url` as the address.

    Raises:
        ConfigError: the folder contains other files than an export.
        StoreFullError: the disk is full.
    """
    before = _manifest(target)
    # Read one state of the catalogue for the whole export: else a page could link to a file that was published in between.
    with catalogue.moment(), disk_errors(target):
        target.mkdir(parents=True, exist_ok=True)
        tree = StaticExport(store, catalogue, target, before, url)
        tree.add_files(tick)
        tree.add_simple_pages()
        tree.add_records()
        tree.add_web_pages()
        nginx = resources.files("index.web").joinpath("data", "nginx.conf").read_text()
        tree.put("nginx.conf", nginx.replace("__POLICY__", POLICY).encode())
        return tree.finish()


def _manifest(target: Path) -> dict[str, str]:
    path = target / MANIFEST
    if path.is_file():
        manifest: dict[str, str] = json.loads(path.read_text())
        return manifest
    if target.is_dir() and any(target.iterdir()):
        raise ConfigError(f"{target} is neither empty nor an earlier export", remedy="give an empty or new folder")
    return {}


def _code_digest() -> str:
    """A digest of the code and templates that render pages. After an upgrade, every page is rendered again."""
    digest = hashlib.sha256(metadata.version("gracefarm").encode())
    with resources.as_file(resources.files("index")) as folder:
        for path in sorted(folder.rglob("*")):
            if path.suffix in {".py", ".sql", ".html", ".css", ".svg", ".js"}:
                digest.update(path.read_bytes())
    return digest.hexdigest()


class StaticExport:
    """The folder: files of the last export (path to digest), and the files that this one writes, keeps and removes."""

    def __init__(self, store: Store, catalogue: Catalogue, target: Path, before: dict[str, str], url: str | None) -> None:
        self.site = Site(store=store, catalogue=catalogue, base_url=url, static=True)
        self.target = target
        self.exported = Exported()
        self._before = before
        self._paths: dict[str, str] = {}
        self._state = {"serial": catalogue.serial(), "url": url, "made by": _code_digest()}
        old = json.loads(before.get(_STATE, "{}"))
        since = old.get("serial", -1)
        changed_set = catalogue.row("SELECT 1 FROM audit WHERE serial > ? AND action LIKE 'set.%' LIMIT 1", (since,))
        known = changed_set is None and {**old, "serial": 0} == {**self._state, "serial": 0}
        rows = catalogue.rows("SELECT name FROM project WHERE serial <= ?", (since if known else -1,))
        self._unchanged = {row["name"] for row in rows}
        "Projects whose exported pages are still valid: neither the project nor the code has changed."

    def add_files(self, tick: Tick = no_tick) -> None:
        """Every file that a page links to, with its metadata."""
        catalogue = self.site.catalogue
        listed = [(view, name) for view in views.public(catalogue) for name in views.projects(catalogue, view)]
        for number, (view, name) in enumerate(listed):
            tick(number, len(listed), name)
            if views.status(catalogue, name).status == "quarantined":
                continue
            shown = views.files(catalogue, view, name)
            for item in shown:
                self._add_file(item)
            for document in views.variants_json(catalogue, view, name, shown):
                self._add_variants(document)
        tick(len(listed), len(listed), "")

    def _add_file(self, item: Listed) -> None:
        if item.url is not None:
            return
        path = f"files/{item.sha256}/{item.filename}"
        self._link(path, item.sha256)
        if item.metadata_sha256:
            self._link(path + ".metadata", item.metadata_sha256)
        if item.provenance_sha256:
            self._link(path + SUFFIX, item.provenance_sha256)

    def _add_variants(self, item: Listed) -> None:
        path = f"files/{item.sha256}/{item.filename}"
        if path not in self._paths:
            for document in variants.documents(self.site.catalogue.database, item.project):
                if document.filename == item.filename:
                    self.put(path, document.content)

    def add_simple_pages(self) -> None:
        """The simple API in each format and coding, and the locks of sets."""
        for view in views.public(self.site.catalogue):
            for name in [*views.projects(self.site.catalogue, view), ""]:
                self._add_simple_page(view, name)
            if view.kind == "set":
                self._add_lock(view)
                self._add_pylock(view)

    def _add_simple_page(self, view: View, name: str) -> None:
        folder = "/".join([*view.prefix, "simple", *([name] if name else [])])
        forms: tuple[Format, ...] = ("json", "html")
        paths = [f"{folder}/index.{form}{suffix}" for form in forms for suffix, _ in _SUFFIXES]
        if name and self._keeps(name, *paths):
            return
        for form in forms:
            page = Page(render(self.site.catalogue, view, name, form, self.site.base_url))
            for suffix, encoding in _SUFFIXES:
                if encoding == "" or page.coding(encoding):
                    self.put(f"{folder}/index.{form}{suffix}", page.body(encoding))

    def _add_lock(self, view: View) -> None:
        try:
            text = requirements.render(self.site.catalogue, view)
        except NotFoundError:  # several versions of a project, or none left: the live server has no lock either
            return
        self.put(f"{view.argument}/{requirements.FILENAME}", text.encode())

    def _add_pylock(self, view: View) -> None:
        raw = staged.pylock_of(self.site.catalogue, view.argument)
        if raw is not None:
            self.put(f"{view.argument}/{pylock.FILENAME}", raw)

    def add_records(self) -> None:
        """Records, logs, matrices, certificates. /records/ID is both a file and a folder, so the tree has index.json in it."""
        for row in self.site.catalogue.rows("SELECT id, document_sha256, log_sha256 FROM public_record"):
            for digest, name in ((row["document_sha256"], "index.json"), (row["log_sha256"], "log")):
                if digest is not None:
                    self._link(f"records/{row['id']}/{name}", digest)
        for row in self.site.catalogue.rows("SELECT name, document_sha256 FROM matrix"):
            self._link(f"matrix/{row['name']}", row["document_sha256"])
        for row in self.site.catalogue.rows("SELECT digest, document_sha256 FROM certificate"):
            self._link(f"certificates/{row['digest']}", row["document_sha256"])

    def add_web_pages(self) -> None:
        """The web pages, without the forms that require a live server."""
        for name, content in static_files().items():
            self.put(f"static/{name}", content)
        for path, body in self._web_pages():
            self.put(path, body)
            self.put(path + ".gz", Page(body).body("gzip"))

    def _web_pages(self) -> Iterator[tuple[str, bytes]]:
        """Path and bytes of every page that is not up to date."""
        site, catalogue = self.site, self.site.catalogue
        project_pages = projects.ProjectPages(site)
        for row in catalogue.rows("SELECT filename, project FROM public_file ORDER BY filename"):
            path = f"wheel/{row['filename']}/index.html"
            if not self._keeps(row["project"], path, f"{path}.gz"):
                yield _page(partial(wheel.wheel, site), f"/wheel/{row['filename']}/", filename=row["filename"])
        for name in projects.names(catalogue):
            path = f"project/{name}/index.html"
            program = f"project/{name}/{choose.FILENAME}"
            if not self._keeps(name, path, f"{path}.gz", program, f"{program}.gz"):
                yield _page(project_pages.project, f"/project/{name}/", name=name)
                if views.status(catalogue, name).status != "quarantined":
                    yield program, _body(partial(choose.choose, site), f"/{program}", name=name)
        for row in catalogue.rows("SELECT id FROM public_record ORDER BY id"):
            yield _page(partial(builds.build, site), f"/board/{row['id']}/", id=row["id"])
        yield _page(partial(board.board, site), "/board/")
        yield _page(partial(sets, site), "/sets/")
        yield _page(project_pages.first, "/")

    def _keeps(self, project: str, *paths: str) -> bool:
        """Keep these pages of the project if they are valid and the first one exists."""
        there = [path for path in paths if path in self._before]
        if project not in self._unchanged or paths[0] not in there or not all((self.target / path).exists() for path in there):
            return False
        self._paths.update((path, self._before[path]) for path in there)
        self.exported.kept += len(there)
        return True

    def put(self, path: str, content: bytes) -> None:
        """Write a file with this content unless it exists."""
        if not self._has(path, hashlib.sha256(content).hexdigest()):
            atomic_write(self.target / path, content)
            self.exported.written += 1

    def _has(self, path: str, digest: str) -> bool:
        """Add the path to the tree; true if the last export wrote it with that digest."""
        self._paths[path] = digest
        has = self._before.get(path) == digest and (self.target / path).exists()
        self.exported.kept += has
        return has

    def _link(self, path: str, digest: str) -> None:
        """Add a hard link to a file of the store, or an atomic copy if the store is on another file system."""
        if path in self._paths or self._has(path, digest):
            return
        source, final = self.site.store.path(digest), self.target / path
        final.parent.mkdir(parents=True, exist_ok=True)
        partial_copy = final.with_name("." + final.name[:200] + ".partial")
        partial_copy.unlink(missing_ok=True)
        try:
            os.link(source, partial_copy)
        except FileNotFoundError:
            raise DamagedError(
                f"the store has lost the file of {path}", remedy="run `index fsck`, upload the file again, then export again"
            ) from None
        except OSError:
            shutil.copyfile(source, partial_copy)
        if not partial_copy.samefile(source):
            partial_copy.chmod(0o644)
        partial_copy.replace(final)
        sync_directory(final.parent)
        self.exported.written += 1

    def finish(self) -> Exported:
        """Remove files that no longer belong to the tree, and write the manifest."""
        for path in sorted(self._before.keys() - self._paths.keys() - {_STATE}):
            self._remove(path)
            self.exported.removed += 1
        manifest = {**self._paths, _STATE: json.dumps(self._state)}
        atomic_write(self.target / MANIFEST, json.dumps(manifest, indent=0, sort_keys=True))
        return self.exported

    def _remove(self, path: str) -> None:
        """Remove the file, and folders that become empty: nginx would answer 403 for them, not 404."""
        (self.target / path).unlink(missing_ok=True)
        for folder in list((self.target / path).parents)[: path.count("/")]:
            try:
                folder.rmdir()
            except OSError:
                return


def _page(page: Callable[[Request], Response], path: str, **params: str) -> tuple[str, bytes]:
    return f"{path[1:]}index.html", _body(page, path, **params)


def _body(page: Callable[[Request], Response], path: str, **params: str) -> bytes:
    scope = {"type": "http", "method": "GET", "path": path, "headers": [], "query_string": b"", "path_params": params}
    return bytes(page(Request(scope)).body)
