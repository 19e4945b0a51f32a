"""Classify failures of uv: the kind of failure, and a sentence.

The module also runs on nodes, so it uses only the standard library.
"""

from __future__ import annotations

import errno
import os
import re

_PROGRESS = re.compile(r"\s*(Downloading|Downloaded|Resolved|Using|Prepared) ")
_KINDS = (
    # kind, words that indicate it (the first match counts)
    ("disk", (os.strerror(errno.ENOSPC).lower(), "enospc")),
    ("digest", ("hash mismatch",)),
    ("absent", ("not found in the package registry",)),
    ("unreachable", ("failed to fetch", "error sending request", "connect error", "timed out", "dns error")),
    ("unsolved", ("no version of", "no wheels")),
)


def explain(output: str) -> tuple[str, str]:
    """Kind of failure (`other` if unknown) and uv's message on one line, without progress and frame."""
    lines = [re.sub(r"^\W+", "", line) for line in output.splitlines() if not _PROGRESS.match(line)]
    message = " ".join(" ".join(lines).split()).removeprefix("error: ")
    low = message.lower()
    kind = next((kind for kind, words in _KINDS if any(word in low for word in words)), "other")
    return kind, message or "uv gave no reason"
