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
from gracefarm.console import Tick, no_tick
from gracefarm.errors import DigestError, FetchError
from gracefarm.settings import Settings

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
    found = choose(source, page.packages, shown(index))
    url = with_credentials(found.url, credentials) if same_host(index, found.url) else found.url
    wanted = Download(url=url, sha256=source.sha256, what=found.filename, size=found.size)
    return download([wanted], settings, tick)[source.sha256]


def choose(source: SdistSource, packages: Sequence[DistributionPackage], index: str) -> DistributionPackage:
    """The file on a project's page that the recipe pins; pure.

    Raises:
        FetchError: no such version, no sdist of it, or it was yanked.
        DigestError: there are sdists of it, none with the pinned digest.
    """
    wanted = f"{source.name} {source.version}"
    of_version = [one for one in packages if _version(one.version) == Version(source.version)]
    if not of_version:
        versions = sorted({version for one in packages if (version := _version(one.version))})
        raise FetchError(
            f"{wanted}: the index {index} has the project, not this version",
            remedy=f"pin one that it has: {', '.join(map(str, versions[-5:]))}"
            if versions
            else "the project has no files at all",
        )
    sdists = [one for one in of_version if one.package_type == "sdist"]
    if not sdists:
        files = ", ".join(one.filename for one in of_version[:3])
        raise FetchError(
            f"{wanted}: the index {index} has no sdist of this version, only {files}",
            remedy="pin its repository instead: [source] kind = 'git' with commit and tree",
        )
    found = next((one for one in sdists if one.digests.get("sha256") == source.sha256), None)
    # An index without digests in its links is allowed by PEP 503; then the download itself is the check.
    found = found or next((one for one in sdists if "sha256" not in one.digests), None)
    if found is None:
        theirs = ", ".join(f"{one.filename} with sha256 {one.digests['sha256']}" for one in sdists)
        raise DigestError(
            f"{wanted}: pinned is sha256 {source.sha256}, the index {index} has {theirs}",
            remedy="nothing was fetched; find out why it differs before you pin another digest",
        )
    if found.is_yanked:
        reason = f": {found.yanked_reason}" if found.yanked_reason else ", without a reason"
        raise FetchError(f"{wanted}: {found.filename} was yanked from the index {index}{reason}", remedy="pin another version")
    return found


def _version(text: str | None) -> Version | None:
    try:
        return Version(text) if text else None
    except InvalidVersion:
        return None
