"""A wheel of an index of its own (PEP 503), as torch has one for each CUDA release: named by the stack, pinned by digest."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from urllib.parse import unquote, urlsplit

from packaging.tags import Tag
from packaging.utils import InvalidWheelFilename, parse_wheel_filename
from packaging.version import Version

from builder.fetch import simple
from builder.fetch.store import download
from builder.fetch.transfer import Download, mirror_remedy
from builder.fetch.urls import shown, split_credentials
from gracefarm.errors import DigestError, FetchError
from gracefarm.settings import Settings


def fetch_wheel(name: str, version: str, sha256: str, index: str, settings: Settings) -> tuple[Path, str]:
    """The wheel of that digest in the store, and its file name, which the index says.

    Raises:
        FetchError: the index cannot be reached or has no such file; names the setting of a mirror.
        DigestError: it has the version, with other digests only.
    """
    found = [one for one in _files(name, version, index, settings) if one[2] in (sha256, None)]
    if not found:
        raise DigestError(
            f"{name} {version}: {shown(index)} has no file with sha256 {sha256}",
            remedy="nothing was fetched; find out why it differs before you pin another digest",
        )
    filename, url, _ = found[0]
    wanted = Download(url=url, sha256=sha256, what=filename)
    return download([wanted], settings)[sha256], filename


def find_wheel(name: str, version: str, tags: Collection[Tag], index: str, settings: Settings) -> tuple[str, str, str | None]:
    """File name, URL and, where the index says it, sha256 of the one wheel of that version that fits the tags.

    Raises:
        FetchError: there is none, or the index cannot be reached.
    """
    for filename, url, sha256 in _files(name, version, index, settings):
        if not parse_wheel_filename(filename)[3].isdisjoint(tags):
            return filename, url, sha256
    raise FetchError(f"{name} {version}: {shown(index)} has no wheel that fits the stack", remedy=mirror_remedy(index))


def _files(name: str, version: str, index: str, settings: Settings) -> list[tuple[str, str, str | None]]:
    """The wheels of a version, with or without a local part as +cu124."""
    place, credentials = split_credentials(settings.redirect(index))
    try:
        page = simple.project_page(name, place, credentials)
    except FetchError as error:
        raise FetchError(error.cause, remedy=mirror_remedy(index)) from error
    found = []
    for one in page.packages:
        filename = unquote(Path(urlsplit(one.url).path).name)
        try:
            _, has, _, _ = parse_wheel_filename(filename)
        except InvalidWheelFilename:
            continue
        if Version(has.public) == Version(version) or has == Version(version):
            found.append((filename, one.url, one.digests.get("sha256")))
    return found
