"""Source distributions from the Python index, by the simple API (PEP 503, PEP 691).

Never `pip download`: it runs the sdist's setup.py to learn its name. Here the page names the file and its bytes are stored.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import requests
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version
from pypi_simple import (
    PYPI_SIMPLE_ENDPOINT,
    DistributionPackage,
    NoSuchProjectError,
    ProjectPage,
    PyPISimple,
    UnexpectedRepoVersionWarning,
    UnsupportedContentTypeError,
    UnsupportedRepoVersionError,
)

from builder.fetch.store import ATTEMPTS, TRANSIENT, Download, download, pause, store_path
from builder.fetch.urls import same_host, shown, split_credentials, with_credentials
from builder.recipe import SdistSource
from gracefarm.console import Tick, no_tick
from gracefarm.errors import DigestError, FetchError
from gracefarm.settings import Settings

INDEX_REMEDY = "see that this machine reaches the index, or name another one: GRACEFARM_PYTHON_INDEX=URL of its simple API"
TIMEOUT = (15.0, 30.0)
"Seconds to connect and between two answers."


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
    index, credentials = split_credentials(settings.index_url or PYPI_SIMPLE_ENDPOINT)
    page = _page(source, index, credentials)
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


def _page(source: SdistSource, index: str, credentials: tuple[str, str] | None) -> ProjectPage:
    """The project's page, with bounded retries.

    Raises:
        FetchError: the project is absent, or the index cannot be reached or is none.
    """
    if urlsplit(index).scheme == "file":
        return _local_page(source, index)
    reason = ""
    with warnings.catch_warnings(), PyPISimple(index, auth=credentials) as client:
        # A newer minor version of the API only adds things (PEP 629).
        warnings.simplefilter("ignore", UnexpectedRepoVersionWarning)
        for attempt in range(ATTEMPTS):
            pause(attempt)
            try:
                return client.get_project_page(source.name, timeout=TIMEOUT)
            except NoSuchProjectError as error:
                raise _no_project(source, index) from error
            except (UnsupportedContentTypeError, UnsupportedRepoVersionError, requests.JSONDecodeError) as error:
                raise FetchError(f"{shown(index)} does not answer as a simple API", remedy=INDEX_REMEDY) from error
            except requests.HTTPError as error:
                status = error.response.status_code if error.response is not None else 0
                reason = f"it says {status}"
                if status not in TRANSIENT:
                    break
            except requests.RequestException as error:
                reason = _reason(error)
    raise FetchError(f"{source.name}: the index {shown(index)} cannot be used: {reason}", remedy=INDEX_REMEDY)


def _reason(error: requests.RequestException) -> str:
    """The innermost sentence: requests wraps the system's in three layers of its own."""
    inner: BaseException = error
    while (following := inner.__cause__ or inner.__context__) is not None:
        inner = following
    return shown(str(inner) or type(inner).__name__)


def _local_page(source: SdistSource, index: str) -> ProjectPage:
    """A page of a static index in a folder."""
    folder = f"{index.rstrip('/')}/{canonicalize_name(source.name)}/"
    place = Path(url2pathname(urlsplit(folder).path)) / "index.html"
    try:
        text = place.read_text()
    except OSError as error:
        raise _no_project(source, index) from error
    return ProjectPage.from_html(source.name, text, base_url=folder)


def _no_project(source: SdistSource, index: str) -> FetchError:
    return FetchError(
        f"{source.name}: the index {shown(index)} has no such project",
        remedy="mend [source] name in the recipe, or name the index that has it: GRACEFARM_PYTHON_INDEX",
    )
