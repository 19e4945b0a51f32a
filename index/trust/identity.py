"""Identity tokens (OpenID Connect) of publishers: fetch the issuer's keys; check signature, audience and times."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from index.errors import UnauthenticatedError

if TYPE_CHECKING:
    from index.trust.issuer import IssuerClient

ALGORITHMS = ("RS256",)
"Algorithms of GitHub and GitLab. Never add a symmetric algorithm or `none`."

REQUIRED = ("iss", "sub", "aud", "exp", "iat", "jti")
"Required claims. jti reveals a second use."

LEEWAY = 30.0
"Maximum difference of two clocks in seconds."

LONGEST = 16 << 10
"Maximum characters of an identity token; GitHub's have 2,000."


class IssuerKeys:
    """The public keys of issuers, cached for five minutes. Safe to use from several threads."""

    def __init__(self) -> None:
        self._clients: dict[str, IssuerClient] = {}
        self._lock = threading.Lock()

    def claims(self, text: str, issuers: Collection[str], audience: str) -> Mapping[str, Any]:
        """Check signature, issuer, audience and times of an identity token; return its claims.

        The first call imports PyJWT, so that a server without publishers starts more quickly.

        Raises:
            UnauthenticatedError: the token is invalid; the message names the reason.
            UnreachableError: the issuer's keys cannot be fetched.
        """
        import jwt

        if len(text) > LONGEST:
            raise _refused("it is too long")
        try:
            issuer = jwt.decode(text, options={"verify_signature": False}).get("iss")
        except (jwt.InvalidTokenError, ValueError, RecursionError) as error:
            raise _refused(f"it is malformed: {error}") from None
        if not isinstance(issuer, str) or issuer not in issuers:
            raise _refused(f"this index has no publisher with the issuer {issuer!r:.200}")
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
    return UnauthenticatedError(f"the identity token is refused: {reason}", remedy="ask the issuer for a new token")
