"""An upload token without a stored secret: a CI job's identity for a short token of the index (PEP 807, a draft)."""

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
    """A short token for uploads to `url`; None outside of a CI that vouches for its jobs, or for an index without such tokens.

    Each call exchanges the job's identity token, which some CIs give once: call it once for all uploads of one publish.

    Raises:
        PublishError: the CI gives the job no identity, or the index does not trust it.
    """
    if not _is_safe(url):  # on a plain http network anybody could read the token
        return None
    with httpx.Client(headers={"Accept": MEDIA}, timeout=TIMEOUT) as client:
        try:
            found = client.get(httpx.URL(url, path="/.well-known/pytp", params={"discover": urlsplit(url).path}))
        except (httpx.HTTPError, httpx.InvalidURL):
            return None  # the upload will say so
        endpoints = _endpoints(found)
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
                f"this job gets no identity token to publish to {url} with: {first_line(str(error), '')}",
                remedy="give the job the permission `id-token: write`, or set TWINE_USERNAME and TWINE_PASSWORD",
            ) from error
        except (httpx.HTTPError, KeyError, ValueError) as error:
            raise PublishError(
                f"{url} does not exchange this job's identity token: {error}",
                remedy="try again, or set TWINE_USERNAME and TWINE_PASSWORD",
            ) from error


def _document(answer: httpx.Response) -> dict[str, Any]:
    """The JSON object of a good answer.

    Raises:
        PublishError: it is a refusal.
        ValueError: it is no JSON object.
    """
    document = answer.json()
    if not isinstance(document, dict):
        raise ValueError(f"{answer.url} is not a JSON object")
    if answer.is_error:
        raise PublishError(
            f"the index gives this job no upload token: {document.get('detail') or answer.reason_phrase}",
            remedy="run `index publisher list` on its machine: it shows which workflows may upload",
        )
    return document


def _endpoints(found: httpx.Response) -> tuple[str, str] | None:
    """Where the audience and a token are asked for; None of any other document: many servers answer every address with 200."""
    try:
        document = found.json() if found.status_code == 200 else None
    except ValueError:
        return None
    places = [document.get(f"{name}-endpoint") for name in ("audience", "token-mint")] if isinstance(document, dict) else []
    match places:
        case [str(ask), str(mint)]:
            return ask, mint
    return None


def _checked(url: str, endpoint: str) -> str:
    """An address of the discovery document, which must be on the host of the uploads.

    Raises:
        ValueError: it is somewhere else.
    """
    if urlsplit(endpoint).hostname != urlsplit(url).hostname or not _is_safe(endpoint):
        raise ValueError(f"the index sends this job to {endpoint}, another host")
    return endpoint


def _is_safe(url: str) -> bool:
    """Nobody on the way can read what is sent there: https, or this machine itself."""
    parts = urlsplit(url)
    return parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in ("127.0.0.1", "::1", "localhost"))
