"""A set's pylock.toml (PEP 751). The author of the set writes it; the index stores it and serves it with requirements.lock."""

from __future__ import annotations

import tomllib
from collections.abc import Container
from typing import TYPE_CHECKING

from index.errors import RefusedError, TooLargeError

if TYPE_CHECKING:
    from packaging.pylock import Package, Pylock

FILENAME = "pylock.toml"

MAX_PYLOCK = 4 << 20
"Maximum bytes. A lock of two hundred wheels has a few hundred thousand."


def parse(raw: bytes) -> Pylock:
    """Parse a pylock.toml.

    Raises:
        RefusedError: it is not a valid pylock.toml, or a package has no file with a sha256.
        TooLargeError: it exceeds MAX_PYLOCK.
    """
    # Imported here, so that a server starts more quickly.
    from packaging.pylock import Pylock, PylockUnsupportedVersionError, PylockValidationError

    if len(raw) > MAX_PYLOCK:
        raise TooLargeError(f"a {FILENAME} may have at most {MAX_PYLOCK} bytes", remedy="lock only the packages of the set")
    try:
        lock = Pylock.from_dict(tomllib.loads(raw.decode()))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise RefusedError(
            f"the {FILENAME} is not TOML: {error}", remedy="write the file again with uv or pip, and send it unmodified"
        ) from None
    except (PylockValidationError, PylockUnsupportedVersionError) as error:
        raise RefusedError(
            f"the {FILENAME} does not conform to PEP 751: {error}", remedy="write the file with a tool that supports PEP 751"
        ) from None
    for package in lock.packages:
        if not _digests(package):
            raise RefusedError(
                f"the {FILENAME} lists {package.name} without the sha256 of a file",
                remedy="use a lock that lists files with sha256, not folders or repositories",
            )
    return lock


def lacking(lock: Pylock, digests: Container[str]) -> list[str]:
    """Packages of the lock without a file among these, by sha256."""
    return sorted(
        f"{package.name}=={package.version}" if package.version else package.name
        for package in lock.packages
        if not any(digest in digests for digest in _digests(package))
    )


def _digests(package: Package) -> set[str]:
    files = [*(package.wheels or ()), package.sdist, package.archive]
    return {file.hashes["sha256"].lower() for file in files if file is not None and "sha256" in file.hashes}
