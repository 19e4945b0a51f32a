"""Which Python a wheel's tag serves."""

from __future__ import annotations

import re

from packaging.tags import Tag

_INTERPRETER = re.compile(r"(cp|py)3(\d*)\Z")


def serves(tag: Tag, python: str) -> bool:
    """Does that CPython 3, as 3.11 or 3.13t, install a wheel of this tag, as far as interpreter and ABI go?

    PEP 425; the stable ABI from its version on: abi3 (PEP 384) of builds with the GIL, abi3t (PEP 803) of free-threaded ones.
    """
    match = _INTERPRETER.match(tag.interpreter)
    if match is None:
        return False
    minor, free = int(python.removesuffix("t").partition(".")[2]), python.endswith("t")
    least = int(match[2] or 0)
    if match[1] == "py":
        return least <= minor
    if tag.abi in ("abi3", "abi3t"):
        return least <= minor and free == tag.abi.endswith("t")
    return least == minor and (tag.abi == "none" or free == tag.abi.endswith("t"))
