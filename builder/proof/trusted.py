"""Upload tokens without stored secrets: exchange a CI job's identity for a token of the index (PEP 807, a draft)."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

import httpx
from id import AmbientCredentialError, detect_credential

from gracefarm.errors import PublishError
from gracefarm.process import first_line

MEDIA = "application/vnd.pypi.pytp.v1+json"

TIMEOUT = 30.0


def upload_token(url: str) -> str | None:
    """A short-lived token for uploads to `url`; None outside of a supported CI, or for an index without such tokens.

    Each call exchanges the job's identity token, which some CIs issue only once: call it once for all uploads.

    Raises:
        PublishError: the CI does not issue an identity token, or the index does not trust it.
    """
    if not _is_safe(url):  # with plain http others could read the token
        return None
    with httpx.Client(headers={"Accept": MEDIA}, timeout=TIMEOUT) as client:
        try:
            answer = client.get(httpx.URL(url, path="/.well-known/pytp", params={"discover": urlsplit(url).path}))
        except (httpx.HTTPError, httpx.InvalidURL):
            return None  # the upload will report it
        endpoints = _endpoints(answer)
        if endpoints is None:
            return None
        ask, mint = endpoints
        try:
            identity = detect_credential(str(_document(client.get(_checked(url, ask)))["audience"]))
            if identity is None:
                return None
            return str(_document(client.post(_checked(url, mint), json={"token": identity}))["token"])
        except AmbientCredentialError as error:
            raise PublishError(
                f"this job cannot get an identity token for {url}: {first_line(str(error), '')}",
                remedy="give the job the permission `id-token: write`, or set TWINE_USERNAME and TWINE_PASSWORD",
            ) from error
        except (httpx.HTTPError, KeyError, ValueError) as error:
            raise PublishError(
                f"the index {url} cannot exchange this job's identity token: {error}",
                remedy="try again, or set TWINE_USERNAME and TWINE_PASSWORD",
            ) from error


def _document(answer: httpx.Response) -> dict[str, Any]:
    """The JSON object of a successful answer.

    Raises:
        PublishError: the index refused the request.
        ValueError: the answer is not a JSON object.
    """
    document = answer.json()
    if not isinstance(document, dict):
        raise ValueError(f"the answer of {answer.url} is not a JSON object")
    if answer.is_error:
        raise PublishError(
            f"the index does not issue an upload token to this job: {document.get('detail') or answer.reason_phrase}",
            remedy="run `index publisher list` on the machine of the index; it lists the workflows that may upload",
        )
    return document


def _endpoints(answer: httpx.Response) -> tuple[str, str] | None:
    """URLs for the audience and for a token; None for other documents, since many servers answer every URL with 200."""
    try:
        document = answer.json() if answer.status_code == 200 else None
    except ValueError:
        return None
    places = [document.get(f"{name}-endpoint") for name in ("audience", "token-mint")] if isinstance(document, dict) else []
    match places:
        case [str(ask), str(mint)]:
            return ask, mint
    return None


def _checked(url: str, endpoint: str) -> str:
    """A URL of the discovery document, which must be on the host of the uploads.

    Raises:
        ValueError: it is on another host.
    """
    if urlsplit(endpoint).hostname != urlsplit(url).hostname or not _is_safe(endpoint):
        raise ValueError(f"the index names {endpoint}, which is on a different host")
    return endpoint


def _is_safe(url: str) -> bool:
    """Whether others cannot read the requests: https, or this machine."""
    parts = urlsplit(url)
    return parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in ("127.0.0.1", "::1", "localhost"))
