"""Defects that affect only their own file. A new upload is refused; a file published elsewhere is accepted and marked."""

from __future__ import annotations

from dataclasses import dataclass, field

from index.errors import RefusedError
from index.names import Distribution


@dataclass(frozen=True, kw_only=True)
class Defects:
    """Collects the defects of one file."""

    distribution: Distribution
    sentences: list[str] = field(default_factory=list)

    def note(self, cause: str, *, remedy: str) -> None:
        """Add a defect.

        Raises:
            RefusedError: the file is a new upload.
        """
        if not self.distribution.published:
            raise RefusedError(f"{self.distribution.filename}: {cause}", remedy=remedy)
        self.sentences.append(cause)
