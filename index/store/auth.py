"""Upload tokens: 256 random bits, stored as a hash, with a scope and an expiry time."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
import secrets
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from gracefarm.errors import UsageError
from index.errors import ForbiddenError, UnauthenticatedError
from index.store import htpasswd
from index.store.catalogue import Catalogue, Transaction, timestamp

NIGHTLY = "nightly"
"The scope of a token for the nightly channel. It is not a valid name for a set."

CACHE = "cache"
"The scope of a token for the shared compiler cache. It is not a valid name for a set."

PREFIX = "gf_"
"Prefix by which secret scanners recognise a leaked token."

_SCOPES = {NIGHTLY: "nightly channel", CACHE: "compiler cache"}
_DURATION = re.compile(r"(\d+)([smhdw])\Z")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


@dataclass(frozen=True, kw_only=True)
class Token:
    """A token without its secret, which only its holder knows."""

    id: int
    name: str
    projects: frozenset[str] | None = None
    "The projects that it covers; None: every project."
    set_name: str | None = None
    expires: str | None = None

    @property
    def actor(self) -> str:
        """The name of the token in the audit log."""
        return f"token:{self.name}"


def create(
    catalogue: Catalogue,
    actor: str,
    name: str,
    *,
    project: str | None = None,
    set_name: str | None = None,
    expires: timedelta | None = None,
) -> str:
    """Create a token. The secret is returned once and never stored."""
    secret = PREFIX + secrets.token_urlsafe(32)
    end = timestamp(datetime.now(UTC) + expires) if expires else None
    with catalogue.change(actor) as change:
        change.execute(
            "INSERT INTO token (name, sha256, project, set_name, created, expires) VALUES (?, ?, ?, ?, ?, ?)",
            (name, _digest(secret), project, set_name, change.time, end),
        )
        change.note("token.create", name, project_scope=project, set_scope=set_name, expires=end)
    return secret


def mint(change: Transaction, name: str, publishers: Sequence[int], lifetime: timedelta) -> tuple[str, datetime]:
    """Create a short-lived token for the projects of these publishers; return the secret and its expiry time.

    Expired minted tokens are deleted, so that their rows do not accumulate.
    """
    secret = PREFIX + secrets.token_urlsafe(32)
    end = datetime.now(UTC) + lifetime
    change.execute("DELETE FROM token WHERE minted = 1 AND expires <= ?", (change.time,))
    row = change.execute(
        "INSERT INTO token (name, sha256, created, expires, minted) VALUES (?, ?, ?, ?, 1) RETURNING id",
        (name, _digest(secret), change.time, timestamp(end)),
    ).fetchone()
    for publisher in publishers:
        change.execute("INSERT INTO minted (token_id, publisher_id) VALUES (?, ?)", (row["id"], publisher))
    change.note("token.mint", name, publishers=list(publishers), expires=timestamp(end))
    return secret, end


def burn(catalogue: Catalogue, secret: str) -> None:
    """Delete a minted token before it expires. Any other secret changes nothing."""
    with catalogue.change("publisher") as change:
        row = change.execute("DELETE FROM token WHERE minted = 1 AND sha256 = ? RETURNING name", (_digest(secret),)).fetchone()
        if row is not None:
            change.note("token.burn", row["name"])


def revoke(catalogue: Catalogue, actor: str, name: str) -> int:
    """Revoke every valid token of that name; return their number.

    Raises:
        UsageError: no valid token has this name.
    """
    with catalogue.change(actor) as change:
        count = change.execute("UPDATE token SET revoked = ? WHERE name = ? AND revoked IS NULL", (change.time, name)).rowcount
        if not count:
            raise UsageError(
                f"no valid token is named {name!r}", remedy="give the name of a token that `index token list` shows"
            )
        change.note("token.revoke", name, count=count)
    return count


def import_users(
    catalogue: Catalogue, actor: str, users: dict[str, str], *, project: str | None = None, set_name: str | None = None
) -> tuple[int, int]:
    """Let the users of an htpasswd file upload with name and password; revoke users that were removed from the file.

    Returns the number of users that were added (or have a new password) and the number of revoked ones.
    """
    with catalogue.change(actor) as change:
        rows = change.execute("SELECT id, name, hashed FROM token WHERE hashed NOT NULL AND revoked IS NULL").fetchall()
        gone = [row for row in rows if users.get(row["name"]) != row["hashed"]]
        known = {row["name"] for row in rows} - {row["name"] for row in gone}
        added = {name: hashed for name, hashed in users.items() if name not in known}
        for row in gone:
            change.execute("UPDATE token SET revoked = ? WHERE id = ?", (change.time, row["id"]))
            change.note("token.revoke", row["name"], user=True)
        for name, hashed in added.items():
            change.execute(
                "INSERT INTO token (name, sha256, project, set_name, created, hashed) VALUES (?, ?, ?, ?, ?, ?)",
                (name, _digest(secrets.token_hex(32)), project, set_name, change.time, hashed),  # not the digest of any secret
            )
            change.note("token.create", name, project_scope=project, set_scope=set_name, user=True)
    return len(added), len([row for row in gone if row["name"] not in users])


def duration(text: str) -> timedelta:
    """90d, 12h, 30m, 45s, 2w.

    Raises:
        UsageError: the text is not a duration.
    """
    match = _DURATION.match(text)
    if not match or not int(match[1]):
        raise UsageError(f"{text!r} is not a duration", remedy="give a number and a unit, such as 90d, 12h or 30m")
    return timedelta(**{_UNITS[match[2]]: int(match[1])})


def identify(catalogue: Catalogue, authorization: str | None) -> Token:
    """The token of an Authorization header: Basic with any user name (twine sends __token__), or Bearer.

    Raises:
        UnauthenticatedError: the token is missing, unknown, expired or revoked; the message does not tell which.
    """
    wanted = _digest(_credentials(authorization)[1])
    row = catalogue.row("SELECT * FROM token WHERE sha256 = ? AND hashed IS NULL", (wanted,))
    stored = row["sha256"] if row else _digest("")
    return _living(catalogue, row, hmac.compare_digest(stored, wanted))


def is_user(authorization: str | None) -> bool:
    """Whether these credentials are a user's password and not a token. Password hashes are slow: see `identify_user`."""
    try:
        name, secret = _credentials(authorization)
    except UnauthenticatedError:
        return False
    return name not in ("", "__token__") and not secret.startswith(PREFIX)


def identify_user(catalogue: Catalogue, authorization: str | None, memory: htpasswd.PasswordMemory) -> Token:
    """The user with this name and password, from `import_users`. Do not call it on the event loop.

    An unknown name takes as long as a wrong password, so that timing does not reveal names.

    Raises:
        UnauthenticatedError: the user is unknown, or the password is wrong.
    """
    name, secret = _credentials(authorization)
    row = catalogue.row(
        "SELECT * FROM token WHERE hashed NOT NULL ORDER BY name = ? DESC, revoked IS NULL DESC, id DESC LIMIT 1", (name,)
    )
    if row is None:
        return _living(catalogue, None, False)
    password = secret.encode()
    good = memory.matches(row["hashed"], password)
    return _living(catalogue, row, good and row["name"] == name)


def _living(catalogue: Catalogue, row: sqlite3.Row | None, good: bool) -> Token:
    if row is None or not good or row["revoked"] or (row["expires"] and row["expires"] <= timestamp()):
        raise UnauthenticatedError(
            "the token or password is unknown, revoked or expired",
            remedy="use a valid token; `index token create` on the machine of the index creates one",
        )
    projects = frozenset((row["project"],)) if row["project"] is not None else None
    if row["minted"]:  # it covers the current projects of its publishers, and nothing once they are removed
        reached = catalogue.rows(
            "SELECT project FROM publisher JOIN minted ON publisher_id = publisher.id WHERE token_id = ?", (row["id"],)
        )
        projects = frozenset(publisher["project"] for publisher in reached)
    return Token(id=row["id"], name=row["name"], projects=projects, set_name=row["set_name"], expires=row["expires"])


def allow(token: Token, *, project: str | None = None, set_name: str | None = None) -> None:
    """Check that the token covers this project and this set (NIGHTLY for the nightly channel).

    Raises:
        ForbiddenError: it does not.
    """
    if token.projects is not None and project not in token.projects:
        names = ", ".join(sorted(token.projects)) or "no project"
        raise ForbiddenError(
            f"the token {token.name!r} is only for {names}" + (f", not for {project}" if project else ""),
            remedy=f"use a token for {project or 'all projects'}",
        )
    allow_set(token, set_name)


def allow_set(token: Token, set_name: str | None) -> None:
    """Check that the token covers this set (NIGHTLY for the nightly channel) for at least one project.

    Raises:
        ForbiddenError: it does not.
    """
    if token.set_name is not None and token.set_name != set_name:
        raise ForbiddenError(
            f"the token {token.name!r} is only for the " + _SCOPES.get(token.set_name, f"set {token.set_name}"),
            remedy="create a token for this purpose with `index token create`"
            if CACHE in (token.set_name, set_name)
            else f"upload to {'' if token.set_name == NIGHTLY else '/stage'}/{token.set_name}/legacy/",
        )


def _digest(secret: str) -> str:
    # A fast hash is sufficient: a secret of 256 random bits cannot be guessed.
    return hashlib.sha256(secret.encode()).hexdigest()


def _credentials(authorization: str | None) -> tuple[str, str]:
    """User name and secret; a bearer token has no name."""
    scheme, _, rest = (authorization or "").strip().partition(" ")
    if scheme.lower() == "bearer" and rest.strip():
        return "", rest.strip()
    if scheme.lower() == "basic":
        try:
            name, _, secret = base64.b64decode(rest.strip(), validate=True).decode().partition(":")
            return name, secret
        except (binascii.Error, UnicodeDecodeError):
            pass
    raise UnauthenticatedError(
        "uploads require a token", remedy="send the token as the password, with the user name __token__"
    )
