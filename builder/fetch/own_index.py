"""Fetch a wheel from an index that the stack names (PEP 503), such as torch's index for a CUDA release; pinned by digest."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from packaging.tags import Tag
from packaging.utils import InvalidWheelFilename, parse_wheel_filename
from packaging.version import Version

from builder.fetch import simple
from builder.fetch.store import download
from builder.fetch.transfer import Download, mirror_remedy
from builder.fetch.urls import shown, split_credentials
from builder.planning.pins import LockedWheel
from builder.planning.settings import Settings
from gracefarm.errors import DigestError, FetchError


def fetch_wheel(wheel: LockedWheel, settings: Settings) -> tuple[Path, str]:
    """The wheel with that digest in the store, and its file name on the index.

    Raises:
        FetchError: the index cannot be reached, has no such file, or has several that cannot be told apart.
        DigestError: the index has the version, but only with other digests.
    """
    fitting = _fitting(wheel.name, wheel.version, wheel.tags, wheel.index, settings)
    files = [file for file in fitting if file[2] == wheel.sha256] or [file for file in fitting if file[2] is None]
    if not files:
        raise DigestError(
            f"{wheel.name} {wheel.version}: {shown(wheel.index)} has no file with sha256 {wheel.sha256}",
            remedy="ask the publisher of the file for its sha256; if the pinned digest is wrong, correct it",
        )
    _require_told(wheel.name, wheel.version, wheel.index, files)
    filename, url, _ = files[0]
    wanted = Download(url=url, sha256=wheel.sha256, what=filename)
    return download([wanted], settings)[wheel.sha256], filename


def find_wheel(name: str, version: str, tags: Collection[Tag], index: str, settings: Settings) -> tuple[str, str, str | None]:
    """File name, URL and, if the index lists it, sha256 of the one wheel of that version that fits the tags.

    Raises:
        FetchError: no wheel fits, several fit and have no digests, or the index cannot be reached.
    """
    fitting = _fitting(name, version, tags, index, settings)
    _require_told(name, version, index, fitting)
    return fitting[0]


def _fitting(
    name: str, version: str, tags: Collection[Tag], index: str, settings: Settings
) -> list[tuple[str, str, str | None]]:
    """The wheels of that version, with or without a local part such as +cu124, for this Python and architecture."""
    place, credentials = split_credentials(settings.redirect(index))
    try:
        page = simple.project_page(name, place, credentials)
    except simple.AbsentProjectError as error:
        remedy = "correct `name` or `index` of this wheel in [[environment.wheels]] of stack.toml"
        raise FetchError(error.cause, remedy=remedy) from error
    except FetchError as error:
        raise FetchError(error.cause, remedy=mirror_remedy(index)) from error
    fitting = []
    for package in page.packages:
        filename = unquote(Path(urlsplit(package.url).path).name)
        try:
            _, has, _, of = parse_wheel_filename(filename)
        except InvalidWheelFilename:
            continue
        if Version(version) in (has, Version(has.public)) and not of.isdisjoint(tags):
            fitting.append((filename, package.url, package.digests.get("sha256")))
    if not fitting:
        raise FetchError(
            f"{name} {version}: {shown(index)} has no wheel that fits the stack",
            remedy="pin a version in stack.toml for which this index has a wheel for the stack's Python and architecture",
        )
    return fitting


def _require_told(name: str, version: str, index: str, files: Sequence[tuple[str, str, str | None]]) -> None:
    """Refuse several files without digests: the bytes of one must not be stored under the name of another."""
    if len(files) > 1 and any(sha256 is None for _, _, sha256 in files):
        names = ", ".join(filename for filename, _, _ in files)
        raise FetchError(
            f"{name} {version}: {shown(index)} has several wheels that fit the stack, and lists no sha256 for them: {names}",
            remedy="use an index whose links end in #sha256=DIGEST (PEP 503), or keep only one of these files in it",
        )
