"""Upload tokens: 256 random bits, kept as a hash, with a scope and an end."""

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
"The scope of a token for the nightly channel; no set can be called so."

PREFIX = "gf_"
"Lets secret scanners recognise a leaked token."

_DURATION = re.compile(r"(\d+)([smhdw])\Z")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


@dataclass(frozen=True, kw_only=True)
class Token:
    """Who writes. The secret itself is known only to its holder."""

    id: int
    name: str
    projects: frozenset[str] | None = None
    "The projects that it is for; None: every project."
    set_name: str | None = None
    expires: str | None = None

    @property
    def actor(self) -> str:
        """How the audit log names it."""
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
    """A new token; the secret is returned once and never stored."""
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
    """A short token that reaches the projects of these publishers; returns the secret and its end.

    Minted tokens that have ended are forgotten, so that many nights leave no rows behind.
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
    """End a minted token before its time; its holder needs it no more. Any other secret changes nothing."""
    with catalogue.change("publisher") as change:
        row = change.execute("DELETE FROM token WHERE minted = 1 AND sha256 = ? RETURNING name", (_digest(secret),)).fetchone()
        if row is not None:
            change.note("token.burn", row["name"])


def revoke(catalogue: Catalogue, actor: str, name: str) -> int:
    """Revoke every live token of that name; returns how many.

    Raises:
        UsageError: there is none.
    """
    with catalogue.change(actor) as change:
        count = change.execute("UPDATE token SET revoked = ? WHERE name = ? AND revoked IS NULL", (change.time, name)).rowcount
        if not count:
            raise UsageError(f"there is no live token named {name!r}", remedy="`index token list` shows them")
        change.note("token.revoke", name, count=count)
    return count


def import_users(
    catalogue: Catalogue, actor: str, users: dict[str, str], *, project: str | None = None, set_name: str | None = None
) -> tuple[int, int]:
    """Let the users of an htpasswd file upload by name and password; those who left the file are revoked.

    Returns how many were added (or have a new password) and how many were revoked.
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
                (name, _digest(secrets.token_hex(32)), project, set_name, change.time, hashed),  # no secret has that digest
            )
            change.note("token.create", name, project_scope=project, set_scope=set_name, user=True)
    return len(added), len([row for row in gone if row["name"] not in users])


def duration(text: str) -> timedelta:
    """90d, 12h, 30m, 45s, 2w.

    Raises:
        UsageError: anything else.
    """
    match = _DURATION.match(text)
    if not match or not int(match[1]):
        raise UsageError(f"{text!r} is not a duration", remedy="write 90d, 12h or 30m")
    return timedelta(**{_UNITS[match[2]]: int(match[1])})


def identify(catalogue: Catalogue, authorization: str | None) -> Token:
    """The token behind an Authorization header: Basic with any user name (twine sends __token__), or Bearer.

    Raises:
        UnauthenticatedError: no token, or an unknown, expired or revoked one; the sentence does not say which.
    """
    wanted = _digest(_credentials(authorization)[1])
    row = catalogue.row("SELECT * FROM token WHERE sha256 = ? AND hashed IS NULL", (wanted,))
    stored = row["sha256"] if row else _digest("")
    return _living(catalogue, row, hmac.compare_digest(stored, wanted))


def is_user(authorization: str | None) -> bool:
    """Do these credentials name a user rather than hold a token? Their hash is slow on purpose: see `identify_user`."""
    try:
        name, secret = _credentials(authorization)
    except UnauthenticatedError:
        return False
    return name not in ("", "__token__") and not secret.startswith(PREFIX)


def identify_user(catalogue: Catalogue, authorization: str | None, memory: htpasswd.PasswordMemory) -> Token:
    """The user behind name and password, from `import_users`. Call it off the event loop.

    An unknown name costs as much time as a wrong password, so that names cannot be told apart.

    Raises:
        UnauthenticatedError: no such user, or another password.
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
        raise UnauthenticatedError("this index does not know that token", remedy="make one with `index token create`")
    projects = frozenset((row["project"],)) if row["project"] is not None else None
    if row["minted"]:  # it reaches what its publishers reach now, and nothing once they are removed
        reached = catalogue.rows(
            "SELECT project FROM publisher JOIN minted ON publisher_id = publisher.id WHERE token_id = ?", (row["id"],)
        )
        projects = frozenset(publisher["project"] for publisher in reached)
    return Token(id=row["id"], name=row["name"], projects=projects, set_name=row["set_name"], expires=row["expires"])


def allow(token: Token, *, project: str | None = None, set_name: str | None = None) -> None:
    """Does the token reach this project, and this set (NIGHTLY for the nightly channel)?

    Raises:
        ForbiddenError: it does not.
    """
    if token.projects is not None and project not in token.projects:
        names = ", ".join(sorted(token.projects)) or "no project any more"
        raise ForbiddenError(f"the token {token.name!r} is for {names} alone", remedy="use a token for this project")
    allow_set(token, set_name)


def allow_set(token: Token, set_name: str | None) -> None:
    """Does the token reach this set (NIGHTLY for the nightly channel), for whichever project?

    Raises:
        ForbiddenError: it does not.
    """
    if token.set_name is not None and token.set_name != set_name:
        raise ForbiddenError(
            f"the token {token.name!r} is for the "
            + ("nightly channel alone" if token.set_name == NIGHTLY else f"set {token.set_name} alone"),
            remedy=f"upload to {'' if token.set_name == NIGHTLY else '/stage'}/{token.set_name}/legacy/",
        )


def _digest(secret: str) -> str:
    # A fast hash is right here: the secret has 256 random bits, so there is nothing to guess slowly.
    return hashlib.sha256(secret.encode()).hexdigest()


def _credentials(authorization: str | None) -> tuple[str, str]:
    """User name and secret; a bearer has no name."""
    scheme, _, rest = (authorization or "").strip().partition(" ")
    if scheme.lower() == "bearer" and rest.strip():
        return "", rest.strip()
    if scheme.lower() == "basic":
        try:
            name, _, secret = base64.b64decode(rest.strip(), validate=True).decode().partition(":")
            return name, secret
        except (binascii.Error, UnicodeDecodeError):
            pass
    raise UnauthenticatedError("uploads need a token", remedy="send it as the password, with the user name __token__")
