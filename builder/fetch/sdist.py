"""Source distributions from the Python index, by the simple API (PEP 503, PEP 691).

Never `pip download`: it runs the sdist's setup.py to learn its name. Here the page names the file and its bytes are stored.
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
    """The sdist of that name, version and sha256 in the store; there already: no network.

    Raises:
        FetchError: project, version or sdist absent, sdist yanked, index unreachable.
        DigestError: the index has an sdist of that version with another sha256.
        DiskFullError: no space in the store.
    """
    sha256 = pinned(source)
    place = store_path(settings, sha256)
    if place.exists():
        return place
    package, url, _ = _on_index(source, settings)
    return download([Download(url=url, sha256=sha256, what=package.filename, size=package.size)], settings, tick)[sha256]


def pinned(source: SdistSource | FileSource) -> str:
    """The digest of a source, which a plan without gaps has.

    Raises:
        ConfigError: it is not known yet.
    """
    if source.sha256 is None:
        raise ConfigError(
            f"the digest of {source.origin} is not known yet: {source.sha256_unknown}",
            remedy="run `builder lock` with the recipe's name",
        )
    return source.sha256


def find(name: str, version: str, settings: Settings) -> tuple[str, str, str | None, str]:
    """File name, address and, if the index gives one, digest of a version's sdist; and the index.

    Raises:
        FetchError: as `fetch_sdist`.
    """
    wanted = SdistSource(kind="sdist", name=name, version=version, sha256_unknown="it is asked for")
    package, url, index = _on_index(wanted, settings)
    return package.filename, url, package.digests.get("sha256"), index


def _on_index(source: SdistSource, settings: Settings) -> tuple[DistributionPackage, str, str]:
    """The sdist on the configured index, its address and the index."""
    # Its clients and parsers take longer to import than `builder build` takes to find that a build exists.
    from builder.fetch import simple

    index, credentials = split_credentials(settings.index_url or simple.DEFAULT_INDEX)
    page = simple.project_page(source.name, index, credentials)
    package = choose(source, page.packages, shown(index))
    url = with_credentials(package.url, credentials) if same_host(index, package.url) else package.url
    return package, url, index


def choose(source: SdistSource, packages: Sequence[DistributionPackage], index: str) -> DistributionPackage:
    """The file on a project's page that the recipe pins, or the only sdist while its digest is not known; pure.

    Raises:
        FetchError: no such version, no sdist of it, or it was yanked.
        DigestError: there are sdists of it, none with the pinned digest.
    """
    wanted = f"{source.name} {source.version}"
    of_version = [package for package in packages if _version(package.version) == Version(source.version)]
    if not of_version:
        versions = sorted({version for package in packages if (version := _version(package.version))})
        raise FetchError(
            f"{wanted}: the index {index} has the project, not this version",
            remedy=f"pin one that it has: {', '.join(map(str, versions[-5:]))}"
            if versions
            else "the project has no files at all",
        )
    sdists = [package for package in of_version if package.package_type == "sdist"]
    if not sdists:
        files = ", ".join(package.filename for package in of_version[:3])
        raise FetchError(
            f"{wanted}: the index {index} has no sdist of this version, only {files}",
            remedy="pin its repository instead: [source] kind = 'git' with commit and tree",
        )
    sdist = next((package for package in sdists if source.sha256 in (None, package.digests.get("sha256"))), None)
    # An index without digests in its links is allowed by PEP 503; then the download itself is the check.
    sdist = sdist or next((package for package in sdists if "sha256" not in package.digests), None)
    if sdist is None:
        theirs = ", ".join(f"{package.filename} with sha256 {package.digests['sha256']}" for package in sdists)
        raise DigestError(
            f"{wanted}: pinned is sha256 {source.sha256}, the index {index} has {theirs}",
            remedy="nothing was fetched; find out why it differs before you pin another digest",
        )
    if sdist.is_yanked:
        reason = f": {sdist.yanked_reason}" if sdist.yanked_reason else ", without a reason"
        raise FetchError(f"{wanted}: {sdist.filename} was yanked from the index {index}{reason}", remedy="pin another version")
    return sdist


def _version(text: str | None) -> Version | None:
    try:
        return Version(text) if text else None
    except InvalidVersion:
        return None
