"""Read a project's page of the simple API, as HTML or JSON, from a server or a folder."""

from __future__ import annotations

import warnings
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import requests
from packaging.utils import canonicalize_name
from pypi_simple import (
    PYPI_SIMPLE_ENDPOINT,
    NoSuchProjectError,
    ProjectPage,
    PyPISimple,
    UnexpectedRepoVersionWarning,
    UnsupportedContentTypeError,
    UnsupportedRepoVersionError,
)

from builder.fetch.transfer import ATTEMPTS, TRANSIENT, pause
from builder.fetch.urls import shown
from gracefarm.errors import FetchError

DEFAULT_INDEX = PYPI_SIMPLE_ENDPOINT
INDEX_REMEDY = (
    "check the network to the index, or set GRACEFARM_PYTHON_INDEX to the URL of the simple API of a different index"
)
TIMEOUT = (15.0, 30.0)
"Seconds to connect and between two answers."


class AbsentProjectError(FetchError):
    """The index answers, but does not have the project."""


def project_page(project: str, index: str, credentials: tuple[str, str] | None) -> ProjectPage:
    """The project's page, with a limited number of retries.

    Raises:
        FetchError: the project does not exist, or the index cannot be reached or is not an index.
    """
    if urlsplit(index).scheme == "file":
        return _local_page(project, index)
    reason = ""
    with warnings.catch_warnings(), PyPISimple(index, auth=credentials) as client:
        # A newer minor version of the API only adds things (PEP 629).
        warnings.simplefilter("ignore", UnexpectedRepoVersionWarning)
        for attempt in range(ATTEMPTS):
            pause(attempt)
            try:
                return client.get_project_page(project, timeout=TIMEOUT)
            except NoSuchProjectError as error:
                raise _no_project(project, index) from error
            except (UnsupportedContentTypeError, UnsupportedRepoVersionError, requests.JSONDecodeError) as error:
                raise FetchError(
                    f"{shown(index)} is not the address of a simple API (PEP 503)", remedy=INDEX_REMEDY
                ) from error
            except requests.HTTPError as error:
                status = error.response.status_code if error.response is not None else 0
                reason = f"HTTP status {status}"
                if status not in TRANSIENT:
                    break
            except requests.RequestException as error:
                reason = _reason(error)
    raise FetchError(f"{project}: the index {shown(index)} cannot be used: {reason}", remedy=INDEX_REMEDY)


def _reason(error: requests.RequestException) -> str:
    """The innermost message: requests wraps the system's error in three others."""
    inner: BaseException = error
    while (following := inner.__cause__ or inner.__context__) is not None:
        inner = following
    return shown(str(inner) or type(inner).__name__)


def _local_page(project: str, index: str) -> ProjectPage:
    """A project's page of a static index in a folder."""
    folder = f"{index.rstrip('/')}/{canonicalize_name(project)}/"
    place = Path(url2pathname(urlsplit(folder).path)) / "index.html"
    try:
        text = place.read_text()
    except OSError as error:
        raise _no_project(project, index) from error
    return ProjectPage.from_html(project, text, base_url=folder)


def _no_project(project: str, index: str) -> AbsentProjectError:
    return AbsentProjectError(
        f"{project}: the index {shown(index)} has no such project",
        remedy="correct `name` of [source] in the recipe, or set GRACEFARM_PYTHON_INDEX to an index that has the project",
    )
