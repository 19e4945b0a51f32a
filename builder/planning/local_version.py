"""The version of a wheel: the recipe's, and a local part for what the wheel depends on of its stack (PEP 440).

`1.7.0+cu130.torch2.11`: CUDA 13.0 and torch 2.11. What upstream calls its own, as `2.8.3+hdim64.128`, comes before.
"""

from __future__ import annotations

import re
from itertools import product

from packaging.version import InvalidVersion, Version

_APPENDED = re.compile(r"(?:(?:cu|cuda|pt|torch)\d+(?:\.\d+)*|cxx11abi(?:true|false|0|1)|\.)+")
"What builds for CUDA and torch append to a local version, as cu12torch2.6cxx11abifalse or pt26cu124."


def named(version: str, cuda: str | None, torch: str | None) -> str:
    """A recipe's version, of a wheel that depends on that CUDA (as 13.0) and that torch (as 2.11.0); None: on none."""
    own = Version(version)
    parts = [own.local] if own.local else []
    if cuda is not None:
        parts.append(f"cu{cuda.replace('.', '')}")
    if torch is not None:
        parts.append(f"torch{Version(torch).major}.{Version(torch).minor}")
    return str(Version(f"{own.public}+{'.'.join(parts)}")) if parts else str(own)


def is_of(built: str, version: str, appends: str | None = None) -> bool:
    """Is `built`, the version that a package's build gave its wheel, the recipe's with nothing but what upstream appends?

    `appends`: text that the recipe says of it, where it is not about CUDA and torch.
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


def same(one: str, other: str) -> bool:
    """Are both spellings of one version?"""
    try:
        return Version(one) == Version(other)
    except InvalidVersion:
        return False


def could_be(name: Version, version: str, cuda: str, torch: str | None) -> bool:
    """Can a wheel of a recipe's version, built with that CUDA and torch, have that version? None of the parts is needed."""
    known = product((None, cuda), (None, torch))
    return name in {Version(named(version, *parts)) for parts in known}


def _normal(text: str | None) -> str | None:
    """A local part as `Version` spells it."""
    return Version(f"0+{text}").local if text else None
