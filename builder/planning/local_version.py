"""The version of a wheel: the recipe's version, and a local part for the CUDA and torch that it depends on (PEP 440).

`1.7.0+cu130.torch2.11`: CUDA 13.0 and torch 2.11. A local part of the recipe's version, as of `2.8.3+hdim64.128`, comes first.
"""

from __future__ import annotations

import re
from itertools import product

from packaging.version import InvalidVersion, Version

_APPENDED = re.compile(r"(?:(?:cu|cuda|pt|torch)\d+(?:\.\d+)*|cxx11abi(?:true|false|0|1)|\.)+")
"Text that builds for CUDA and torch append to a local version, such as cu12torch2.6cxx11abifalse or pt26cu124."


def named(version: str, cuda: str | None, torch: str | None) -> str:
    """A recipe's version with the local part for CUDA (as 13.0) and torch (as 2.11.0); None: no dependency on it."""
    own = Version(version)
    parts = [own.local] if own.local else []
    if cuda is not None:
        parts.append(f"cu{cuda.replace('.', '')}")
    if torch is not None:
        parts.append(f"torch{Version(torch).major}.{Version(torch).minor}")
    return str(Version(f"{own.public}+{'.'.join(parts)}")) if parts else str(own)


def is_of(built: str, version: str, appends: str | None = None) -> bool:
    """Whether `built`, the version from a package's build, is the recipe's version, with or without text for CUDA and torch.

    `appends`: other text that upstream appends, from the recipe.
    """
    try:
        had, wanted = Version(built), Version(version)
    except InvalidVersion:
        return False
    own, local = wanted.local or "", had.local or ""
    if Version(had.public) != Version(wanted.public) or not (local == own or local.startswith(f"{own}." if own else "")):
        return False
    rest = local.removeprefix(own).removeprefix(".")
    return not rest or rest == _normal(appends) or _APPENDED.fullmatch(rest) is not None


def same(version: str, other: str) -> bool:
    """Whether both are spellings of one version."""
    try:
        return Version(version) == Version(other)
    except InvalidVersion:
        return False


def could_be(name: Version, version: str, cuda: str, torch: str | None) -> bool:
    """Whether a wheel of a recipe's version, built with that CUDA and torch, can have the version `name`."""
    known = product((None, cuda), (None, torch))
    return name in {Version(named(version, *parts)) for parts in known}


def _normal(text: str | None) -> str | None:
    """A local part as `Version` spells it."""
    return Version(f"0+{text}").local if text else None
