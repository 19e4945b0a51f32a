"""Whether a licence allows redistribution."""

from __future__ import annotations

import re
from collections.abc import Iterator

_NOT_PASSED_ON = re.compile(r"LicenseRef-.*|CC-BY(?:-NC)?-ND-.*|CC-BY-NC-.*", re.IGNORECASE)
"""A licence that SPDX does not list has terms that a person has to read. Among the Creative Commons licences, ND forbids
modified copies, such as a wheel of its source, and NC forbids commercial use, which a public index cannot exclude."""


def redistributable(expression: str) -> bool:
    """Whether an SPDX expression allows redistribution: all parts joined by AND, or one of the parts joined by OR."""
    words = iter(re.findall(r"[()]|[^\s()]+", expression))
    return _any(words)


def _any(words: Iterator[str]) -> bool:
    """Evaluate up to the closing parenthesis, or the end. AND binds more tightly than OR."""
    allowed, all_parts = False, True
    for word in words:
        match word.upper():
            case "(":
                all_parts = _any(words) and all_parts
            case ")":
                break
            case "OR":
                allowed, all_parts = allowed or all_parts, True
            case "WITH":
                next(words, None)  # an exception only grants more
            case "AND":
                pass
            case _:
                all_parts = all_parts and not _NOT_PASSED_ON.fullmatch(word)
    return allowed or all_parts
