"""Identity tokens (OpenID Connect) of publishers: fetch the issuer's keys, check signature, audience and times."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from index.errors import UnauthenticatedError, UnreachableError
from index.trust.publishers import is_safe_url

if TYPE_CHECKING:
    from jwt import PyJWKClient

ALGORITHMS = ("RS256",)
"What GitHub and GitLab sign with. Never one that a shared secret, or nothing, could sign with."

REQUIRED = ("iss", "sub", "aud", "exp", "iat", "jti")
"Claims without which a token is refused; jti is what tells a second use."

LEEWAY = 30.0
"Seconds by which two clocks may differ."

TIMEOUT = 10.0
"Seconds that an issuer may take to answer."

LONGEST = 16 << 10
"Characters of an identity token; GitHub's have 2,000."


class IssuerKeys:
    """The public keys of issuers, kept for five minutes (PyJWKClient's own memory). Safe to use from several threads."""

    def __init__(self) -> None:
        self._clients: dict[str, PyJWKClient] = {}
        self._lock = threading.Lock()

    def claims(self, text: str, issuers: Collection[str], audience: str) -> Mapping[str, Any]:
        """The claims of an identity token whose signature, issuer, audience and times are good.

        Imports PyJWT when it is first called: a server that nobody asks for a token starts quicker without.

        Raises:
            UnauthenticatedError: the token is not good; the sentence says what is wrong with it.
            UnreachableError: the issuer's keys cannot be fetched.
        """
        import jwt

        if len(text) > LONGEST:
            raise _refused("it is too long")
        try:
            issuer = jwt.decode(text, options={"verify_signature": False}).get("iss")
        except (jwt.InvalidTokenError, ValueError, RecursionError) as error:
            raise _refused(f"it cannot be read: {error}") from None
        if not isinstance(issuer, str) or issuer not in issuers:
            raise _refused(f"this index trusts no publisher of the issuer {issuer!r:.200}")
        try:
            key = self._client(issuer).get_signing_key_from_jwt(text)
            claims: dict[str, Any] = jwt.decode(
                text,
                key,
                algorithms=list(ALGORITHMS),
                audience=audience,
                issuer=issuer,
                leeway=LEEWAY,
                options={"require": list(REQUIRED), "strict_aud": True},
            )
        except jwt.PyJWKClientConnectionError as error:
            raise UnreachableError(
                f"the issuer {issuer} cannot be asked for its keys: {error}", remedy="try again in a minute"
            ) from None
        except (jwt.PyJWTError, ValueError, RecursionError) as error:
            raise _refused(str(error)) from None
        return claims

    def _client(self, issuer: str) -> PyJWKClient:
        from jwt import PyJWKClient

        with self._lock:
            client = self._clients.get(issuer)
            if client is None:
                client = self._clients[issuer] = PyJWKClient(_keys_url(issuer), timeout=TIMEOUT)
            return client


def _keys_url(issuer: str) -> str:
    """Where the issuer says that its keys are (OpenID Connect Discovery 1.0).

    Raises:
        UnreachableError: it does not answer, or not with a document that names a safe address.
    """
    import httpx

    place = issuer.rstrip("/") + "/.well-known/openid-configuration"
    try:
        answer = httpx.get(place, timeout=TIMEOUT)
        document = answer.raise_for_status().json()
    except (httpx.HTTPError, ValueError) as error:
        raise UnreachableError(f"{place} cannot be fetched: {error}", remedy="try again in a minute") from None
    keys = document.get("jwks_uri") if isinstance(document, dict) else None
    if not isinstance(keys, str) or not is_safe_url(keys) or document.get("issuer") != issuer:
        raise UnreachableError(
            f"{place} is not the description of that issuer", remedy="correct the issuer with `index publisher add --issuer`"
        )
    return keys


def _refused(reason: str) -> UnauthenticatedError:
    return UnauthenticatedError(f"the identity token is refused: {reason}", remedy="ask the issuer for a new one")
