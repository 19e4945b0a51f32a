"""Users of a pypiserver: names and password hashes in the format of Apache's htpasswd."""

from __future__ import annotations

import hmac
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_bytes

import bcrypt
from passlib.hash import apr_md5_crypt

from gracefarm.errors import ConfigError

_APR1 = "$apr1$"
_BCRYPT = ("$2y$", "$2b$", "$2a$")
_SHA1 = "{SHA}"


def read(path: Path) -> dict[str, str]:
    """Names and hashes of a file written by `htpasswd` (bcrypt or apr1).

    Raises:
        ConfigError: the file is unreadable, or a line has another kind of hash.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}",
            remedy="check that the path is a file and that you have read permission",
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a text file", remedy="give a file that `htpasswd -B` wrote") from error
    users: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, _, hashed = line.strip().partition(":")
        if hashed.startswith(_SHA1):
            raise ConfigError(
                f"{path}, line {number}: the password of {name} is hashed with SHA-1, which is too weak",
                remedy=f"hash the password again: `htpasswd -B {path} {name}`",
            )
        if not name or not hashed.startswith((*_BCRYPT, _APR1)):
            raise ConfigError(
                f"{path}, line {number}: expected a user with a bcrypt or apr1 hash",
                remedy=f"remove this line, then add the user with `htpasswd -B {path} USER`",
            )
        users[name] = hashed
    return users


def matches(password: bytes, hashed: str) -> bool:
    """Whether this is the password. Takes as long as the hash's cost demands: bcrypt of cost 10 takes about 60 ms."""
    if b"\0" in password:  # not a C string, so no tool has created a hash of it
        return False
    try:
        if hashed.startswith(_APR1):
            return bool(apr_md5_crypt.verify(password, hashed))
        # bcrypt uses at most 72 bytes. The current library refuses longer passwords instead of truncating them.
        return bcrypt.checkpw(password[:72], hashed.encode())
    except ValueError:
        return False


@dataclass(kw_only=True)
class PasswordMemory:
    """Cache of correct passwords under a key that exists only in this process, so that each slow hash is computed once."""

    _key: bytes = field(default_factory=lambda: token_bytes(32), repr=False)
    _known: dict[str, bytes] = field(default_factory=dict, repr=False)

    def matches(self, hashed: str, password: bytes) -> bool:
        """Whether this is the password. Correct ones are cached."""
        mark = hmac.digest(self._key, hashed.encode() + b"\0" + password, "sha256")
        if hmac.compare_digest(self._known.get(hashed, b""), mark):
            return True
        good = matches(password, hashed)
        if good:
            self._known[hashed] = mark
        return good
