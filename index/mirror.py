"""Third-party wheels of a set's lock: copied or linked by their sha256, visible in that set's view alone."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from packaging.utils import InvalidSdistFilename, InvalidWheelFilename, parse_sdist_filename, parse_wheel_filename
from packaging.version import InvalidVersion
from pypi_simple import (
    PYPI_SIMPLE_ENDPOINT,
    DistributionPackage,
    NoSuchProjectError,
    PyPISimple,
    UnsupportedContentTypeError,
    UnsupportedRepoVersionError,
)
from requests import RequestException

from gracefarm.console import Tick, no_tick
from gracefarm.errors import DigestError, FetchError
from index import metadata
from index.catalogue import Catalogue, Change
from index.lock import Pin
from index.names import normalise
from index.store import Store, disk_errors, flush


@dataclass(frozen=True, kw_only=True)
class Mirrored:
    """What one pin became."""

    name: str
    filename: str
    how: str
    "ours, copied, linked, kept."
    size: int


@dataclass(frozen=True, kw_only=True)
class _Found:
    filename: str
    version: str
    kind: str
    sha256: str
    size: int
    url: str
    metadata_sha256: str | None
    requires_python: str | None


def mirror(
    store: Store,
    catalogue: Catalogue,
    actor: str,
    set_name: str,
    pins: list[Pin],
    *,
    index_url: str | None,
    link: bool,
    tick: Tick = no_tick,
) -> list[Mirrored]:
    """Bring every file of the lock into the set; can be repeated, and goes on where it was stopped.

    Raises:
        FetchError: a pin that the upstream index does not have, or an upstream that does not answer.
        DigestError: an upstream that sends other bytes than were locked.
        StoreFullError: no space.
    """
    done: list[Mirrored] = []
    # Requests' own user agent would hide who asks.
    with PyPISimple(index_url or PYPI_SIMPLE_ENDPOINT) as upstream, httpx.Client(follow_redirects=True, timeout=60) as client:
        for number, pin in enumerate(pins):
            tick(number, len(pins), pin.name)
            found = _ours(catalogue, actor, set_name, pin) or _kept(catalogue, set_name, pin, link=link)
            done += found or [
                _take(store, catalogue, actor, set_name, pin, item, client, link=link) for item in _upstream(upstream, pin)
            ]
    tick(len(pins), len(pins), "")
    return done


def _ours(catalogue: Catalogue, actor: str, set_name: str, pin: Pin) -> list[Mirrored]:
    """Files of ours with a locked digest join the set as they are."""
    rows = catalogue.rows("SELECT id, filename, sha256, size FROM file WHERE project = ? AND deleted IS NULL", (pin.name,))
    own = [row for row in rows if row["sha256"] in pin.sha256]
    if own:
        with catalogue.change(actor) as change:
            for row in own:
                change.execute("INSERT OR IGNORE INTO member (set_name, file_id) VALUES (?, ?)", (set_name, row["id"]))
            change.note("set.add", f"{set_name} {pin.name}", pin.name)
    return [Mirrored(name=pin.name, filename=row["filename"], how="ours", size=row["size"]) for row in own]


def _kept(catalogue: Catalogue, set_name: str, pin: Pin, *, link: bool) -> list[Mirrored]:
    rows = catalogue.rows(
        "SELECT filename, sha256, size, url FROM mirrored WHERE set_name = ? AND project = ?", (set_name, pin.name)
    )
    return [
        Mirrored(name=pin.name, filename=row["filename"], how="kept", size=row["size"])
        for row in rows
        if row["sha256"] in pin.sha256 and (row["url"] is not None) == link
    ]


def _upstream(upstream: PyPISimple, pin: Pin) -> list[_Found]:
    try:
        page = upstream.get_project_page(pin.name)
    except NoSuchProjectError as error:
        raise FetchError(
            f"the upstream index has no project {pin.name}", remedy="set GRACEFARM_PYTHON_INDEX to one that has"
        ) from error
    except (RequestException, UnsupportedContentTypeError, UnsupportedRepoVersionError) as error:
        raise FetchError(
            f"the upstream index does not answer for {pin.name}: {type(error).__name__}", remedy="try again later"
        ) from error
    found = [
        _found(package, digest) for package in page.packages if (digest := package.digests.get("sha256", "")) in pin.sha256
    ]
    if not found:
        raise FetchError(
            f"the upstream index has no file of {pin.name} {pin.version} with a locked sha256",
            remedy="lock again, or set GRACEFARM_PYTHON_INDEX to the index that the lock was made with",
        )
    return found


def _found(package: DistributionPackage, digest: str) -> _Found:
    digests = package.metadata_digests or {}
    return _Found(
        filename=package.filename,
        version=_version(package.filename),
        kind="bdist_wheel" if package.filename.endswith(".whl") else "sdist",
        sha256=digest,
        size=package.size or 0,
        url=package.url,
        metadata_sha256=digests.get("sha256") if package.has_metadata else None,
        requires_python=package.requires_python,
    )


def _version(filename: str) -> str:
    try:
        parsed = parse_wheel_filename(filename)[1] if filename.endswith(".whl") else parse_sdist_filename(filename)[1]
    except (InvalidWheelFilename, InvalidSdistFilename, InvalidVersion) as error:
        raise FetchError(f"the upstream index calls a locked file {filename!r}", remedy="lock another file") from error
    return str(parsed)


def _take(
    store: Store, catalogue: Catalogue, actor: str, set_name: str, pin: Pin, item: _Found, client: httpx.Client, *, link: bool
) -> Mirrored:
    if link:
        size = item.size or _remote_size(client, item)
        with catalogue.change(actor) as change:
            _insert(change, set_name, pin.name, item, size, item.metadata_sha256, url=item.url)
        return Mirrored(name=pin.name, filename=item.filename, how="linked", size=size)
    with _download(store, client, item) as staged:
        raw = _metadata_of(staged, item.filename)
        size = staged.stat().st_size
        digest = hashlib.sha256(raw).hexdigest() if raw is not None else None
        with catalogue.change(actor) as change:
            store.adopt(staged, item.sha256)
            if raw is not None and digest is not None:
                store.add_bytes(raw, digest)
            _insert(change, set_name, pin.name, item, size, digest, url=None)
    return Mirrored(name=pin.name, filename=item.filename, how="copied", size=size)


def _insert(
    change: Change, set_name: str, project: str, item: _Found, size: int, metadata_sha256: str | None, *, url: str | None
) -> None:
    change.execute(
        "INSERT OR REPLACE INTO mirrored (set_name, filename, project, version, kind, sha256, size, metadata_sha256,"
        " requires_python, uploaded, url) VALUES (?,?,?,?,?,?,?,?,?,?,?)",
        (
            *(set_name, item.filename, normalise(project), item.version, item.kind, item.sha256, size, metadata_sha256),
            *(item.requires_python, change.time, url),
        ),
    )
    change.note("set.mirror", f"{set_name} {item.filename}", sha256=item.sha256, linked=url is not None)


def _remote_size(client: httpx.Client, item: _Found) -> int:
    """PEP 700 wants sizes; an upstream without them is asked for the length."""
    try:
        answer = client.head(item.url)
        return int(answer.raise_for_status().headers.get("content-length", 0))
    except httpx.HTTPError as error:
        raise FetchError(f"{item.filename} cannot be had from upstream: {error}", remedy="try again later") from error


@contextmanager
def _download(store: Store, client: httpx.Client, item: _Found) -> Iterator[Path]:
    staged = store.new_staging()
    try:
        digest = hashlib.sha256()
        with disk_errors(store.root), staged.open("xb") as stream, client.stream("GET", item.url) as answer:
            answer.raise_for_status()
            for chunk in answer.iter_raw():
                digest.update(chunk)
                stream.write(chunk)
            flush(stream)
        if digest.hexdigest() != item.sha256:
            raise DigestError(
                f"upstream sent {item.filename} with sha256 {digest.hexdigest()}, not {item.sha256}", remedy="do not trust it"
            )
        yield staged
    except httpx.HTTPError as error:
        raise FetchError(
            f"{item.filename} cannot be had from upstream: {error}", remedy="the same command goes on from here"
        ) from error
    finally:
        staged.unlink(missing_ok=True)


def _metadata_of(path: Path, filename: str) -> bytes | None:
    """METADATA of a wheel whose digest was locked: it is trusted as far as the lock is."""
    if not filename.endswith(".whl"):
        return None
    folder = "-".join(filename.split("-")[:2]).lower() + ".dist-info/metadata"
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.lower() == folder]
            if len(names) == 1 and archive.getinfo(names[0]).file_size <= metadata.MAX_METADATA:
                return archive.read(names[0])
    except zipfile.BadZipFile:
        return None
    return None
