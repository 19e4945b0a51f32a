"""Fetch source distributions from the Python index with the simple API (PEP 503, PEP 691).

`pip download` is not used, since it runs the sdist's setup.py to find its name. Here nothing of the sdist is executed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.version import InvalidVersion, Version

from builder.fetch.store import download, store_path
from builder.fetch.transfer import Download
from builder.fetch.urls import same_host, shown, split_credentials, with_credentials
from builder.planning.settings import Settings
from builder.planning.sources import FileSource, SdistSource
from gracefarm.console import Tick, no_tick
from gracefarm.errors import ConfigError, DigestError, FetchError

if TYPE_CHECKING:
    from pypi_simple import DistributionPackage


def fetch_sdist(source: SdistSource, settings: Settings, tick: Tick = no_tick) -> Path:
    """Fetch the sdist of that name, version and sha256, if it is not in the store.

    Raises:
        FetchError: project, version or sdist does not exist, the sdist was yanked, or the index cannot be reached.
        DigestError: the index has an sdist of that version with another sha256.
        DiskFullError: no space left in the store.
    """
    sha256 = pinned(source)
    place = store_path(settings, sha256)
    if place.exists():
        return place
    package, url, _ = _on_index(source, settings)
    return download([Download(url=url, sha256=sha256, what=package.filename, size=package.size)], settings, tick)[sha256]


def pinned(source: SdistSource | FileSource) -> str:
    """The digest of a source; a plan without gaps has one.

    Raises:
        ConfigError: the digest is unknown.
    """
    if source.sha256 is None:
        raise ConfigError(
            f"the digest of {source.origin} is unknown: {source.sha256_unknown}",
            remedy="write the digest with `builder lock RECIPE`",
        )
    return source.sha256


def find(name: str, version: str, settings: Settings) -> tuple[str, str, str | None, str]:
    """File name, URL and, if the index lists it, digest of a version's sdist; and the index.

    Raises:
        FetchError: as in `fetch_sdist`.
    """
    wanted = SdistSource(kind="sdist", name=name, version=version, sha256_unknown="it is asked for")
    package, url, index = _on_index(wanted, settings)
    return package.filename, url, package.digests.get("sha256"), index


def _on_index(source: SdistSource, settings: Settings) -> tuple[DistributionPackage, str, str]:
    """The sdist on the configured index, its URL, and the index."""
    # Its clients and parsers take longer to import than `builder build` takes to find that a build exists.
    from builder.fetch import simple

    index, credentials = split_credentials(settings.index_url or simple.DEFAULT_INDEX)
    page = simple.project_page(source.name, index, credentials)
    package = choose(source, page.packages, shown(index))
    url = with_credentials(package.url, credentials) if same_host(index, package.url) else package.url
    return package, url, index


def choose(source: SdistSource, packages: Sequence[DistributionPackage], index: str) -> DistributionPackage:
    """The file on a project's page that the recipe pins, or an sdist of that version while its digest is unknown.

    Raises:
        FetchError: there is no such version, it has no sdist, or the sdist was yanked.
        DigestError: the version has sdists, but none with the pinned digest.
    """
    wanted = f"{source.name} {source.version}"
    of_version = [package for package in packages if _version(package.version) == Version(source.version)]
    if not of_version:
        versions = sorted({version for package in packages if (version := _version(package.version))})
        raise FetchError(
            f"{wanted}: the index {index} has the project, but not this version",
            remedy=f"pin a version that the index has: {', '.join(map(str, versions[-5:]))}"
            if versions
            else "pin a different project, since the index has no files of this project",
        )
    sdists = [package for package in of_version if package.package_type == "sdist"]
    if not sdists:
        files = ", ".join(package.filename for package in of_version[:3])
        raise FetchError(
            f"{wanted}: the index {index} has no sdist of this version, only {files}",
            remedy="pin the project's repository instead: in [source], set kind = 'git', url, commit and tree",
        )
    sdist = next((package for package in sdists if source.sha256 in (None, package.digests.get("sha256"))), None)
    # PEP 503 allows links without digests; the digest is checked after the download.
    sdist = sdist or next((package for package in sdists if "sha256" not in package.digests), None)
    if sdist is None:
        theirs = ", ".join(f"{package.filename} with sha256 {package.digests['sha256']}" for package in sdists)
        raise DigestError(
            f"{wanted}: sha256 {source.sha256} is pinned, but the index {index} has {theirs}",
            remedy="ask the publisher of the file for its sha256; if the pinned digest is wrong, correct it",
        )
    if sdist.is_yanked:
        reason = f": {sdist.yanked_reason}" if sdist.yanked_reason else ", without a reason"
        raise FetchError(
            f"{wanted}: {sdist.filename} was yanked from the index {index}{reason}", remedy="pin a different version"
        )
    return sdist


def _version(text: str | None) -> Version | None:
    try:
        return Version(text) if text else None
    except InvalidVersion:
        return None
