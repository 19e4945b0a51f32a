"""Exchange a publisher's identity token for a short-lived upload token: once, and only for its projects (PEP 807)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from index.errors import ForbiddenError, UnauthenticatedError
from index.store import auth
from index.store.catalogue import Catalogue, Transaction, timestamp
from index.trust import publishers
from index.trust.identity import LEEWAY, IssuerKeys
from index.trust.publishers import TrustedPublisher

LIFETIME = timedelta(minutes=30)
"Lifetime of an upload token. PEP 807 requires 15 minutes to 6 hours. An upload that began in time may end later."


@dataclass(frozen=True, kw_only=True)
class MintedToken:
    """The token that the publisher receives."""

    secret: str
    expires: int
    "Expiry time as Unix time in seconds."
    projects: tuple[str, ...]


def exchange(catalogue: Catalogue, keys: IssuerKeys, text: str) -> MintedToken:
    """Create a short-lived upload token for the projects that trust the publisher of this identity token.

    Do not call it on the event loop: it may have to fetch the issuer's keys.

    Raises:
        UnauthenticatedError: the identity token is invalid, or was exchanged before.
        ForbiddenError: no project trusts its publisher.
        UnreachableError: the issuer's keys cannot be fetched.
        NotFoundError: no project has a publisher.
    """
    trusted = publishers.all_publishers(catalogue)
    issuers = {publisher.issuer for publisher in trusted}
    claims = keys.claims(text, issuers, publishers.audience(catalogue))
    matching = [publisher for publisher in trusted if publisher.matches(claims)]
    if not matching:
        raise ForbiddenError(
            f"no project of this index trusts {_described(claims)}",
            remedy="to trust this workflow, run `index publisher add` on the machine of the index",
        )
    with catalogue.change(f"publisher:{matching[0].name}") as change:
        _spend(change, claims)
        reached = [publisher for publisher in matching if _keeps_number(change, publisher, claims)]
        if not reached:
            raise ForbiddenError(
                f"{matching[0].repository} is not the trusted repository: the name is the same, but the numeric id differs",
                remedy="if the repository was replaced on purpose, run `index publisher remove` and `index publisher add` on "
                "the machine of the index",
            )
        ids = [publisher.id for publisher in reached]
        secret, end = auth.mint(change, matching[0].name, ids, LIFETIME)
    projects = tuple(publisher.project for publisher in reached)
    return MintedToken(secret=secret, expires=int(end.timestamp()), projects=projects)


def _spend(change: Transaction, claims: Mapping[str, Any]) -> None:
    """Mark the identity token as used.

    Raises:
        UnauthenticatedError: it was used before.
    """
    digest = hashlib.sha256(f"{claims['iss']}\n{claims['jti']}".encode()).hexdigest()
    end = timestamp(datetime.fromtimestamp(int(claims["exp"]), UTC) + timedelta(seconds=2 * LEEWAY))
    change.execute("DELETE FROM spent WHERE expires < ?", (change.time,))
    if not change.execute("INSERT OR IGNORE INTO spent (digest, expires) VALUES (?, ?)", (digest, end)).rowcount:
        raise UnauthenticatedError(
            "the identity token is refused: it was exchanged before", remedy="ask the issuer for a new token"
        )


def _keeps_number(change: Transaction, publisher: TrustedPublisher, claims: Mapping[str, Any]) -> bool:
    """Whether the repository has the same numeric id as at its first exchange, which stores the id."""
    number = publisher.number_in(claims)
    if publisher.repository_id is None and number:
        change.execute("UPDATE publisher SET repository_id = ? WHERE id = ?", (number, publisher.id))
        return True
    return publisher.repository_id is None or publisher.repository_id == number


def _described(claims: Mapping[str, Any]) -> str:
    """Describe the publisher of a token, so that the operator can add it."""
    repository = claims.get("repository") or claims.get("project_path") or claims.get("sub")
    workflow = claims.get("job_workflow_ref") or claims.get("ci_config_ref_uri") or "no workflow"
    environment = f", environment {claims['environment']}" if claims.get("environment") else ""
    return f"the repository {repository!s:.200} with the workflow {workflow!s:.300}{environment}"
