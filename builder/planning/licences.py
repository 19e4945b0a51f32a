"""Whether a licence allows that what it covers is passed on."""

from __future__ import annotations

import re
from collections.abc import Iterator

_NOT_PASSED_ON = re.compile(r"LicenseRef-.*|CC-BY(?:-NC)?-ND-.*|CC-BY-NC-.*", re.IGNORECASE)
"""What SPDX does not list is a maker's own terms, which a person has to read. Of Creative Commons' licences, ND allows no
changed copies, as a wheel is one of its source, and NC no commercial use, which a public index cannot exclude."""


def redistributable(expression: str) -> bool:
    """Whether an SPDX expression allows it: all parts joined by AND, one of those joined by OR."""
    words = iter(re.findall(r"[()]|[^\s()]+", expression))
    return _any(words)


def _any(words: Iterator[str]) -> bool:
    """Up to the closing parenthesis, or the end. AND binds more than OR."""
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
                next(words, None)  # an exception only allows more
            case "AND":
                pass
            case _:
                all_parts = all_parts and not _NOT_PASSED_ON.fullmatch(word)
    return allowed or all_parts
