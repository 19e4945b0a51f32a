"""A set's lock: requirements with the sha256 of every file, as pip and uv read them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from gracefarm.errors import ConfigError

_HASH = re.compile(r"--hash[= ]sha256:([0-9a-f]{64})(?=\s|$)")


@dataclass(frozen=True, kw_only=True)
class Pin:
    """One line of the lock."""

    name: str
    "Normalised."
    version: str
    sha256: frozenset[str]


def read(path: Path) -> list[Pin]:
    """Every pin of the lock.

    Raises:
        ConfigError: the file is absent, or a line is not NAME==VERSION with at least one sha256.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigError(
            f"the lock {path} cannot be read: {error.strerror}", remedy="give the path of a requirements.lock"
        ) from error
    lines = re.sub(r"\\\n", " ", text).splitlines()
    return [_pin(path, line.strip()) for line in lines if line.strip() and not line.strip().startswith(("#", "-"))]


def _pin(path: Path, line: str) -> Pin:
    head = re.split(r"\s--hash|\s#", line)[0]
    hashes = frozenset(_HASH.findall(line))
    try:
        requirement = Requirement(head)
    except InvalidRequirement as error:
        raise ConfigError(
            f"{path}: {head!r} is not a requirement", remedy="lock with hashes, as `uv pip compile --generate-hashes`"
        ) from error
    pins = [item.version for item in requirement.specifier if item.operator in ("==", "===")]
    if len(pins) != 1 or len(requirement.specifier) != 1 or not hashes:
        raise ConfigError(
            f"{path}: {requirement.name} is not pinned to one version with its sha256",
            remedy="lock with hashes, as `uv pip compile --generate-hashes`",
        )
    return Pin(name=str(canonicalize_name(requirement.name)), version=pins[0], sha256=hashes)
