"""Identity tokens (OpenID Connect) of publishers: fetch the issuer's keys, check signature, audience and times."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from index.errors import UnauthenticatedError

if TYPE_CHECKING:
    from index.trust.issuer import IssuerClient

ALGORITHMS = ("RS256",)
"What GitHub and GitLab sign with. Never one that a shared secret, or nothing, could sign with."

REQUIRED = ("iss", "sub", "aud", "exp", "iat", "jti")
"Claims without which a token is refused; jti is what tells a second use."

LEEWAY = 30.0
"Seconds by which two clocks may differ."

LONGEST = 16 << 10
"Characters of an identity token; GitHub's have 2,000."


class IssuerKeys:
    """The public keys of issuers, kept for five minutes. Safe to use from several threads."""

    def __init__(self) -> None:
        self._clients: dict[str, IssuerClient] = {}
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
        except (jwt.PyJWTError, ValueError, RecursionError) as error:
            raise _refused(str(error)) from None
        return claims

    def _client(self, issuer: str) -> IssuerClient:
        from index.trust.issuer import IssuerClient

        with self._lock:
            return self._clients.setdefault(issuer, IssuerClient(issuer))


def _refused(reason: str) -> UnauthenticatedError:
    return UnauthenticatedError(f"the identity token is refused: {reason}", remedy="ask the issuer for a new one")
