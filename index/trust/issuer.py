"""The keys of one issuer of identity tokens, as PyJWT keeps them, and that it did not answer a moment ago."""

from __future__ import annotations

import http.client
import threading
import time
from typing import Any

import httpx
from jwt import PyJWKClient, PyJWTError

from index.errors import UnreachableError
from index.trust.publishers import is_safe_url

TIMEOUT = 10.0
"Seconds that an issuer may take to answer."

SILENCE = 10.0
"Seconds for which an issuer that did not answer is not asked again: anybody may send a token that names it."


class IssuerClient(PyJWKClient):
    """Fetches the issuer's keys and keeps them for five minutes. Safe to use from several threads.

    Keys that are kept stay good while the issuer does not answer.
    """

    def __init__(self, issuer: str) -> None:
        self.issuer = issuer
        self._described = False
        self._silent_until = 0.0
        self._fetching = threading.Lock()
        super().__init__(issuer.rstrip("/") + "/.well-known/openid-configuration", timeout=TIMEOUT)

    def fetch_data(self) -> Any:
        """The issuer's key set. PyJWT calls it when it has none, an old one, or one without the key asked for.

        Raises:
            UnreachableError: the issuer does not answer, did not some seconds ago, or answers with something else.
        """
        with self._fetching:
            if time.monotonic() < self._silent_until:
                raise UnreachableError(f"the issuer {self.issuer} did not answer a moment ago", remedy="try again in a minute")
            try:
                if not self._described:
                    self.uri, self._described = _keys_url(self.issuer, self.uri), True
                return super().fetch_data()
            except (PyJWTError, http.client.HTTPException, OSError, ValueError, RecursionError) as error:
                self._silent_until = time.monotonic() + SILENCE
                raise UnreachableError(
                    f"the issuer {self.issuer} cannot be asked for its keys: {error}", remedy="try again in a minute"
                ) from None
            except UnreachableError:
                self._silent_until = time.monotonic() + SILENCE
                raise


def _keys_url(issuer: str, place: str) -> str:
    """Where the issuer says, at `place`, that its keys are (OpenID Connect Discovery 1.0).

    Raises:
        UnreachableError: it does not answer, or not with a document that names a safe address.
    """
    try:
        answer = httpx.get(place, timeout=TIMEOUT)
        document = answer.raise_for_status().json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, RecursionError) as error:
        raise UnreachableError(f"{place} cannot be fetched: {error}", remedy="try again in a minute") from None
    keys = document.get("jwks_uri") if isinstance(document, dict) else None
    if not isinstance(keys, str) or not is_safe_url(keys) or document.get("issuer") != issuer:
        raise UnreachableError(
            f"{place} is not the description of that issuer", remedy="correct the issuer with `index publisher add --issuer`"
        )
    return keys
