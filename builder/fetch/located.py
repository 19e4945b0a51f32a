"""Find the download of a recipe's [[files]] entry: a URL, a file of the Python index, or a package of Debian's archive."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from packaging.version import InvalidVersion, Version

from builder.fetch import debian_mirror
from builder.fetch.transfer import Download
from builder.fetch.urls import same_host, shown, split_credentials, with_credentials
from builder.planning.settings import Settings
from builder.planning.sources import File
from gracefarm.errors import DigestError, FetchError

if TYPE_CHECKING:
    from pypi_simple import DistributionPackage


def locate(file: File, sha256: str, settings: Settings) -> Download:
    """The download of a file that is not in the store yet.

    Raises:
        FetchError: the index has no such project or version, cannot be reached, or has yanked the file.
        DigestError: the index has the version, but no file with that digest.
        HostError: no mirror of Debian's archive is known.
    """
    if file.deb is not None and file.suite is not None:
        url = f"{debian_mirror.mirror(file.suite, settings)}/{file.deb}"
        return Download(url=url, sha256=sha256, what=file.path)
    if file.name is None or file.version is None:
        return Download(url=file.url or "", sha256=sha256, what=file.path)
    # Its clients and parsers take longer to import than `builder build` takes to find that a build exists.
    from builder.fetch import simple

    index, credentials = split_credentials(settings.index_url or simple.DEFAULT_INDEX)
    page = simple.project_page(file.name, index, credentials)
    package = _choose(file.name, Version(file.version), sha256, page.packages, shown(index))
    url = with_credentials(package.url, credentials) if same_host(index, package.url) else package.url
    return Download(url=url, sha256=sha256, what=package.filename, size=package.size)


def _choose(
    name: str, version: Version, sha256: str, packages: Sequence[DistributionPackage], index: str
) -> DistributionPackage:
    """The file of that version with that digest; or the version's only file, if the index lists no digests."""
    of_version = [package for package in packages if _is(package.version, version)]
    if not of_version:
        raise FetchError(
            f"{name} {version}: the index {index} has the project, but not this version",
            remedy=f"pin a version that the index has: {_newest(packages)}",
        )
    chosen = next((package for package in of_version if package.digests.get("sha256") == sha256), None)
    if chosen is None and len(of_version) == 1 and "sha256" not in of_version[0].digests:
        chosen = of_version[0]
    if chosen is None:
        names = ", ".join(package.filename for package in of_version)
        raise DigestError(
            f"{name} {version}: the index {index} has no file with sha256 {sha256}, only these files: {names}",
            remedy="ask the publisher of the file for its sha256; if the pinned digest is wrong, correct it",
        )
    if chosen.is_yanked:
        reason = f": {chosen.yanked_reason}" if chosen.yanked_reason else ", without a reason"
        raise FetchError(
            f"{name} {version}: {chosen.filename} was yanked from the index {index}{reason}", remedy="pin a different version"
        )
    return chosen


def _newest(packages: Sequence[DistributionPackage]) -> str:
    """The newest versions of a project, in one line."""
    versions: set[Version] = set()
    for package in packages:
        with suppress(InvalidVersion):
            versions.add(Version(package.version or ""))
    return ", ".join(map(str, sorted(versions)[-5:])) or "(it lists no valid version)"


def _is(text: str | None, version: Version) -> bool:
    try:
        return text is not None and Version(text) == version
    except InvalidVersion:
        return False
