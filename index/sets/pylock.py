"""A set's pylock.toml (PEP 751): who makes the set writes it; the index keeps it and serves it beside requirements.lock."""

from __future__ import annotations

import tomllib
from collections.abc import Container
from typing import TYPE_CHECKING

from index.errors import RefusedError, TooLargeError

if TYPE_CHECKING:
    from packaging.pylock import Package, Pylock

FILENAME = "pylock.toml"

MAX_PYLOCK = 4 << 20
"Bytes; two hundred wheels need a few hundred thousand."


def parse(raw: bytes) -> Pylock:
    """The lock of these bytes.

    Raises:
        RefusedError: they are no pylock.toml, or a package of it has no file by sha256.
        TooLargeError: over MAX_PYLOCK.
    """
    # Here: a server starts quicker without.
    from packaging.pylock import Pylock, PylockUnsupportedVersionError, PylockValidationError

    if len(raw) > MAX_PYLOCK:
        raise TooLargeError(f"a {FILENAME} of more than {MAX_PYLOCK} bytes is refused", remedy="lock the set alone")
    try:
        lock = Pylock.from_dict(tomllib.loads(raw.decode()))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise RefusedError(f"the {FILENAME} is not TOML: {error}", remedy="send the file as it was written") from None
    except (PylockValidationError, PylockUnsupportedVersionError) as error:
        raise RefusedError(f"the {FILENAME} is not one of PEP 751: {error}", remedy="write it with such a tool") from None
    for package in lock.packages:
        if not _digests(package):
            raise RefusedError(
                f"the {FILENAME} names {package.name} without the sha256 of a file",
                remedy="lock files, not folders or repositories",
            )
    return lock


def lacking(lock: Pylock, digests: Container[str]) -> list[str]:
    """Packages of the lock of which no file is among these, by sha256."""
    return sorted(
        f"{package.name}=={package.version}" if package.version else package.name
        for package in lock.packages
        if not any(digest in digests for digest in _digests(package))
    )


def _digests(package: Package) -> set[str]:
    files = [*(package.wheels or ()), package.sdist, package.archive]
    return {file.hashes["sha256"].lower() for file in files if file is not None and "sha256" in file.hashes}
