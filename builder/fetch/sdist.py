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
from builder.planning.recipe import SdistSource
from builder.planning.settings import Settings
from gracefarm.console import Tick, no_tick
from gracefarm.errors import DigestError, FetchError

if TYPE_CHECKING:
    from pypi_simple import DistributionPackage


def fetch_sdist(source: SdistSource, settings: Settings, tick: Tick = no_tick) -> Path:
    """The sdist of that name, version and sha256 in the store; there already: no network.

    Raises:
        FetchError: project, version or sdist absent, sdist yanked, index unreachable.
        DigestError: the index has an sdist of that version with another sha256.
        DiskFullError: no space in the store.
    """
    place = store_path(settings, source.sha256)
    if place.exists():
        return place
    # Its clients and parsers take longer to import than `builder build` takes to find that a build exists.
    from builder.fetch import simple

    index, credentials = split_credentials(settings.index_url or simple.DEFAULT_INDEX)
    page = simple.project_page(source.name, index, credentials)
    package = choose(source, page.packages, shown(index))
    url = with_credentials(package.url, credentials) if same_host(index, package.url) else package.url
    wanted = Download(url=url, sha256=source.sha256, what=package.filename, size=package.size)
    return download([wanted], settings, tick)[source.sha256]


def choose(source: SdistSource, packages: Sequence[DistributionPackage], index: str) -> DistributionPackage:
    """The file on a project's page that the recipe pins; pure.

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
    sdist = next((package for package in sdists if package.digests.get("sha256") == source.sha256), None)
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
