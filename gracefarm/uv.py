"""What uv says when it fails: the kind of failure, and a sentence. It runs on nodes too: Python's own modules alone."""

from __future__ import annotations

import errno
import os
import re

_PROGRESS = re.compile(r"\s*(Downloading|Downloaded|Resolved|Using|Prepared) ")
_KINDS = (
    # kind, words that mean it (the first that fits counts)
    ("disk", (os.strerror(errno.ENOSPC).lower(), "enospc")),
    ("digest", ("hash mismatch",)),
    ("absent", ("not found in the package registry",)),
    ("unreachable", ("failed to fetch", "error sending request", "connect error", "timed out", "dns error")),
    ("unsolved", ("no version of", "no wheels")),
)


def explain(output: str) -> tuple[str, str]:
    """Kind of failure (`other` where no word tells) and uv's own words, without progress and frame, on one line."""
    lines = [re.sub(r"^\W+", "", line) for line in output.splitlines() if not _PROGRESS.match(line)]
    message = " ".join(" ".join(lines).split()).removeprefix("error: ")
    low = message.lower()
    kind = next((kind for kind, words in _KINDS if any(word in low for word in words)), "other")
    return kind, message or "it gave no reason"
