"""Counters while serving: plain numbers, text only when asked (see exposition)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Metrics:
    """What happened since the start."""

    requests: Counter[tuple[str, int]] = field(default_factory=Counter)
    "By method and status."
    sent: int = 0
    "Bytes of bodies."
    uploads: Counter[str] = field(default_factory=Counter)
    "By outcome: created, same, or the status that refused it."

    def request(self, method: str, status: int, size: int) -> None:
        """Count one answer."""
        self.requests[method, status] += 1
        self.sent += size
