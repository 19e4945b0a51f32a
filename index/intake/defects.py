"""What only one file suffers from: a new upload is refused for it, what others published is taken and marked."""

from __future__ import annotations

from dataclasses import dataclass, field

from index.errors import RefusedError
from index.names import Distribution


@dataclass(frozen=True, kw_only=True)
class Defects:
    """The defects of one file, as they are found."""

    distribution: Distribution
    sentences: list[str] = field(default_factory=list)

    def note(self, cause: str, *, remedy: str) -> None:
        """One defect.

        Raises:
            RefusedError: the file is a new upload.
        """
        if not self.distribution.published:
            raise RefusedError(f"{self.distribution.filename}: {cause}", remedy=remedy)
        self.sentences.append(cause)
