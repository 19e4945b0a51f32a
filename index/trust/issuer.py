"""The keys of one issuer of identity tokens, cached by PyJWT, and a short memory of its failures."""

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
"Maximum seconds for a response of an issuer."

SILENCE = 10.0
"Seconds after a failure before the issuer is asked again. Any client may send a token that names the issuer."


class IssuerClient(PyJWKClient):
    """Fetches the issuer's keys and caches them for five minutes. Safe to use from several threads.

    Cached keys stay valid while the issuer does not respond.
    """

    def __init__(self, issuer: str) -> None:
        self.issuer = issuer
        self._described = False
        self._silent_until = 0.0
        self._fetching = threading.Lock()
        super().__init__(issuer.rstrip("/") + "/.well-known/openid-configuration", timeout=TIMEOUT)

    def fetch_data(self) -> Any:
        """The issuer's key set. PyJWT calls this if it has no key set, an old one, or one without the requested key.

        Raises:
            UnreachableError: the issuer does not respond, failed some seconds ago, or sends an invalid response.
        """
        with self._fetching:
            if time.monotonic() < self._silent_until:
                raise UnreachableError(
                    f"the issuer {self.issuer} did not respond to an earlier request", remedy="try again in a minute"
                )
            try:
                if not self._described:
                    self.uri, self._described = _keys_url(self.issuer, self.uri), True
                return super().fetch_data()
            except (PyJWTError, http.client.HTTPException, OSError, ValueError, RecursionError) as error:
                self._silent_until = time.monotonic() + SILENCE
                raise UnreachableError(
                    f"failed to fetch the keys of the issuer {self.issuer}: {error}", remedy="try again in a minute"
                ) from None
            except UnreachableError:
                self._silent_until = time.monotonic() + SILENCE
                raise


def _keys_url(issuer: str, place: str) -> str:
    """The address of the issuer's keys, from its document at `place` (OpenID Connect Discovery 1.0).

    Raises:
        UnreachableError: the issuer does not respond, or the document does not name a safe address.
    """
    try:
        answer = httpx.get(place, timeout=TIMEOUT)
        document = answer.raise_for_status().json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, RecursionError) as error:
        raise UnreachableError(f"failed to fetch {place}: {error}", remedy="try again in a minute") from None
    keys = document.get("jwks_uri") if isinstance(document, dict) else None
    if not isinstance(keys, str) or not is_safe_url(keys) or document.get("issuer") != issuer:
        raise UnreachableError(
            f"{place} names a different issuer than {issuer}, or contains no https address of the issuer's keys",
            remedy="run `index publisher remove`, then `index publisher add` with the correct --issuer",
        )
    return keys
