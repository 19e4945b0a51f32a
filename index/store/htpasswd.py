"""Users of a pypiserver: names and password hashes as Apache's htpasswd writes them."""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_bytes

import bcrypt

from gracefarm.errors import ConfigError

_ITOA64 = b"./0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_BCRYPT = ("$2y$", "$2b$", "$2a$")


def read(path: Path) -> dict[str, str]:
    """Names and hashes of a file that `htpasswd` wrote (bcrypt, apr1 or SHA-1).

    Raises:
        ConfigError: no such file, or a line with a hash of another kind.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", remedy="give a file that `htpasswd -B` wrote") from error
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, _, hashed = line.strip().partition(":")
        if not name or not hashed.startswith((*_BCRYPT, "$apr1$", "{SHA}")):
            raise ConfigError(
                f"{path}, line {number}: not a user with a hash of bcrypt, apr1 or SHA-1", remedy="write it with `htpasswd -B`"
            )
        found[name] = hashed
    return found


def matches(password: bytes, hashed: str) -> bool:
    """Is this the password? Takes as long as the hash was made to: bcrypt of cost 10 some 60 ms."""
    if hashed.startswith("{SHA}"):
        made = "{SHA}" + base64.b64encode(hashlib.sha1(password, usedforsecurity=False).digest()).decode()
    elif hashed.startswith("$apr1$"):
        made = apr1(password, hashed.split("$")[2].encode())
    else:
        # bcrypt has never read more than 72 bytes; its current library refuses longer ones instead of cutting them.
        try:
            return b"\0" not in password and bcrypt.checkpw(password[:72], hashed.encode())
        except ValueError:
            return False
    return hmac.compare_digest(made.encode(), hashed.encode())


def apr1(password: bytes, salt: bytes) -> str:
    """Apache's variant of crypt's MD5 scheme, as `openssl passwd -apr1` makes it."""
    salt = salt[:8]
    mixed = password + b"$apr1$" + salt
    inner = _md5(password + salt + password)
    mixed += (inner * (len(password) // 16 + 1))[: len(password)]
    bits = len(password)
    while bits:
        mixed += b"\0" if bits & 1 else password[:1]
        bits >>= 1
    digest = _md5(mixed)
    for turn in range(1000):
        odd = turn & 1
        middle = (salt if turn % 3 else b"") + (password if turn % 7 else b"")
        digest = _md5((password if odd else digest) + middle + (digest if odd else password))
    text = b""
    for places in ((0, 6, 12), (1, 7, 13), (2, 8, 14), (3, 9, 15), (4, 10, 5)):
        text += _to64(digest[places[0]] << 16 | digest[places[1]] << 8 | digest[places[2]], 4)
    return f"$apr1${salt.decode()}${(text + _to64(digest[11], 2)).decode()}"


def _md5(content: bytes) -> bytes:
    return hashlib.md5(content, usedforsecurity=False).digest()


def _to64(value: int, count: int) -> bytes:
    return bytes(_ITOA64[value >> 6 * place & 63] for place in range(count))


@dataclass(kw_only=True)
class Memory:
    """Passwords that were right, under a key that dies with the process: a hash made slow on purpose is computed once."""

    _key: bytes = field(default_factory=lambda: token_bytes(32), repr=False)
    _known: dict[str, bytes] = field(default_factory=dict, repr=False)

    def knows(self, hashed: str, password: bytes) -> bool:
        """Was this password right for this hash before?"""
        return hmac.compare_digest(self._known.get(hashed, b""), self._mark(hashed, password))

    def matches(self, hashed: str, password: bytes, check: Callable[[bytes, str], bool] = matches) -> bool:
        """`matches`, remembered when it is right."""
        good = check(password, hashed)
        if good:
            self._known[hashed] = self._mark(hashed, password)
        return good

    def _mark(self, hashed: str, password: bytes) -> bytes:
        return hmac.digest(self._key, hashed.encode() + b"\0" + password, "sha256")
