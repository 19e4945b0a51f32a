"""A static tree that nginx or an object store serves: the same bytes as the live pages, only what changed written anew."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from gracefarm.console import Tick, no_tick
from gracefarm.errors import ConfigError
from gracefarm.files import atomic_write, sync_directory
from index.errors import DamagedError, NotFoundError
from index.pages import views
from index.pages.negotiate import Encoding, Form
from index.pages.shelf import Page, render
from index.pages.views import Listed, View
from index.people import web
from index.sets import setlock
from index.store.catalogue import Catalogue
from index.store.files import Store, disk_errors

MANIFEST = ".gracefarm-export.json"
_STATE = ""
"Key of the manifest that is no path: what the export was made from."

_SUFFIXES: tuple[tuple[str, Encoding], ...] = (("", ""), (".gz", "gzip"), (".zst", "zstd"))

NGINX = """# Serves this folder as an index: include it inside http { }.
map $http_accept $gracefarm_page {
    default                                          index.html;
    "~application/vnd\\.pypi\\.simple\\.(v1|latest)\\+json"  index.json;
}
server {
    listen      __LISTEN__;
    root        __ROOT__;
    gzip_static on;
    charset_types text/plain text/css;
    types {
        application/vnd.pypi.simple.v1+json json;
        text/html html;
        text/css css;
        image/svg+xml svg;
        application/octet-stream whl;
        application/x-tar gz;
        text/plain metadata;
    }
    location /files/ {
        add_header Cache-Control "public, max-age=31536000, immutable";
        charset     utf-8;
        gzip_static off;
    }
    location /static/ {
        charset    utf-8;
        add_header Cache-Control "public, max-age=86400";
    }
    location / {
        index      index.html;
        charset    utf-8;
        add_header Content-Security-Policy "__POLICY__";
        add_header X-Content-Type-Options nosniff;
        add_header Cache-Control no-cache;
    }
    location ~ ^/records/[^/]+$ {
        types { }
        default_type application/json;
        add_header   Cache-Control no-cache;
        try_files    $uri/index.json =404;
    }
    location ~ ^/records/[^/]+/log$ {
        types { }
        default_type text/plain;
        charset      utf-8;
        add_header   X-Content-Type-Options nosniff;
        add_header   Cache-Control no-cache;
    }
    location ~ /simple/ {
        index      $gracefarm_page;
        charset    utf-8;
        add_header Vary "Accept, Accept-Encoding";
        add_header Cache-Control "max-age=60, public";
    }
}
"""


@dataclass
class Exported:
    """What an export did."""

    written: int = 0
    kept: int = 0
    removed: int = 0
    _paths: dict[str, str] = field(default_factory=dict)


def export(store: Store, catalogue: Catalogue, target: Path, tick: Tick = no_tick, *, url: str | None = None) -> Exported:
    """Bring `target` up to date. Files come before the pages that name them, removals last, so a reader never meets a hole.

    `url` is what the pages for people print as the address.

    Raises:
        ConfigError: the folder holds something that is not an export.
        StoreFullError: no space.
    """
    before = _manifest(target)
    # One moment of the catalogue for all of it: a publish in between would give pages that name files which are not there.
    with catalogue.moment():
        return _export(store, catalogue, target, tick, before, url)


def _export(store: Store, catalogue: Catalogue, target: Path, tick: Tick, before: dict[str, str], url: str | None) -> Exported:
    done = Exported()
    fresh = _Fresh(catalogue, target, before, done, _state(catalogue, url))
    with disk_errors(target):
        target.mkdir(parents=True, exist_ok=True)
        listed = [(view, name) for view in views.public(catalogue) for name in views.projects(catalogue, view)]
        for number, (view, name) in enumerate(listed):
            tick(number, len(listed), name)
            if views.status(catalogue, name).status == "quarantined":
                continue
            for item in views.files(catalogue, view, name):
                _export_file(store, target, item, before, done)
        for view in views.public(catalogue):
            for name in [*views.projects(catalogue, view), ""]:
                _export_page(catalogue, target, view, name, before, done, fresh)
            if view.kind == "set":
                _export_lock(catalogue, target, view, before, done)
        _export_records(store, catalogue, target, before, done)
        for path, body in web.static_pages(store, catalogue, url, fresh.keeps):
            _put(target, path, body, before, done)
            if path.endswith(".html"):
                _put(target, path + ".gz", Page(body).body("gzip"), before, done)
        _put(target, "nginx.conf", NGINX.replace("__POLICY__", web.POLICY).encode(), before, done)
        for path in sorted(before.keys() - done._paths.keys() - {_STATE}):
            _remove(target, path)
            done.removed += 1
        manifest = {**done._paths, _STATE: json.dumps(fresh.state)}
        atomic_write(target / MANIFEST, json.dumps(manifest, indent=0, sort_keys=True))
    tick(len(listed), len(listed), "")
    return done


def _state(catalogue: Catalogue, url: str | None) -> dict[str, object]:
    """What pages are made of, besides their project's files."""
    return {"serial": catalogue.serial(), "url": url, "made by": web.making()}


class _Fresh:
    """Which pages of the last export are still right: those of projects that have not changed since, made by the same code."""

    def __init__(
        self, catalogue: Catalogue, target: Path, before: dict[str, str], done: Exported, state: dict[str, object]
    ) -> None:
        self.state = state
        self._target, self._before, self._done = target, before, done
        old = json.loads(before.get(_STATE, "{}"))
        since = old.get("serial", -1)
        sets = catalogue.row("SELECT 1 FROM audit WHERE serial > ? AND action LIKE 'set.%' LIMIT 1", (since,))
        known = sets is None and {**old, "serial": 0} == {**state, "serial": 0}
        rows = catalogue.rows("SELECT name FROM project WHERE serial <= ?", (since if known else -1,))
        self._projects = {row["name"] for row in rows}

    def keeps(self, project: str, *paths: str) -> bool:
        """Keep these pages of the project as they are, if they are right and there; the first one must be."""
        if project not in self._projects or not all((self._target / path).exists() for path in self._there(paths)):
            return False
        if paths[0] not in self._before:
            return False
        for path in self._there(paths):
            self._done._paths[path] = self._before[path]
            self._done.kept += 1
        return True

    def _there(self, paths: tuple[str, ...]) -> list[str]:
        return [path for path in paths if path in self._before]


def _manifest(target: Path) -> dict[str, str]:
    path = target / MANIFEST
    if path.is_file():
        found: dict[str, str] = json.loads(path.read_text())
        return found
    if target.is_dir() and any(target.iterdir()):
        raise ConfigError(f"{target} is not empty and not an export", remedy="export into a new folder")
    return {}


def _export_file(store: Store, target: Path, item: Listed, before: dict[str, str], done: Exported) -> None:
    if item.url is not None:
        return
    path = f"files/{item.sha256}/{item.filename}"
    _link(store.path(item.sha256), target, path, item.sha256, before, done)
    if item.metadata_sha256:
        _link(store.path(item.metadata_sha256), target, path + ".metadata", item.metadata_sha256, before, done)


def _link(source: Path, target: Path, path: str, digest: str, before: dict[str, str], done: Exported) -> None:
    """A hard link on the same file system, else a copy that appears whole."""
    if path in done._paths:
        return
    done._paths[path] = digest
    final = target / path
    if before.get(path) == digest and final.exists():
        done.kept += 1
        return
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = final.with_name("." + final.name[:200] + ".partial")
    partial.unlink(missing_ok=True)
    try:
        os.link(source, partial)
    except FileNotFoundError:
        raise DamagedError(f"the store has lost the file of {path}", remedy="export again; `index fsck` tells more") from None
    except OSError:
        shutil.copyfile(source, partial)
    partial.chmod(0o644) if not partial.samefile(source) else None
    partial.replace(final)
    sync_directory(final.parent)
    done.written += 1


def _export_page(
    catalogue: Catalogue, target: Path, view: View, name: str, before: dict[str, str], done: Exported, fresh: _Fresh
) -> None:
    folder = "/".join([*view.prefix, "simple", *([name] if name else [])])
    forms: tuple[Form, ...] = ("json", "html")
    paths = [f"{folder}/index.{form}{suffix}" for form in forms for suffix, _ in _SUFFIXES]
    if name and fresh.keeps(name, *paths):
        return
    for form in forms:
        page = Page(render(catalogue, view, name, form))
        for suffix, encoding in _SUFFIXES:
            if encoding == "" or page.coding(encoding):
                _put(target, f"{folder}/index.{form}{suffix}", page.body(encoding), before, done)


def _export_lock(catalogue: Catalogue, target: Path, view: View, before: dict[str, str], done: Exported) -> None:
    try:
        text = setlock.render(catalogue, view)
    except NotFoundError:  # several versions of one project, or none of it any more: the live server has no lock either
        return
    _put(target, f"{view.argument}/{setlock.FILENAME}", text.encode(), before, done)


def _export_records(store: Store, catalogue: Catalogue, target: Path, before: dict[str, str], done: Exported) -> None:
    """Records and logs: /records/ID is a file and a folder at once on the live server, so the tree has ID/index.json."""
    for row in catalogue.rows("SELECT id, document_sha256, log_sha256 FROM public_record"):
        for digest, name in ((row["document_sha256"], "index.json"), (row["log_sha256"], "log")):
            if digest is not None:
                _link(store.path(digest), target, f"records/{row['id']}/{name}", digest, before, done)


def _remove(target: Path, path: str) -> None:
    """The file, and the folders that it leaves empty: nginx would answer 403 for them, not 404."""
    (target / path).unlink(missing_ok=True)
    for folder in list((target / path).parents)[: path.count("/")]:
        try:
            folder.rmdir()
        except OSError:
            return


def _put(target: Path, path: str, content: bytes, before: dict[str, str], done: Exported) -> None:
    digest = hashlib.sha256(content).hexdigest()
    done._paths[path] = digest
    if before.get(path) == digest and (target / path).exists():
        done.kept += 1
        return
    atomic_write(target / path, content)
    done.written += 1
