"""Defects of a file. A new upload is refused for each of them.

A file that was published elsewhere is accepted and marked if a defect affects only this file. It is refused if installers
would fail on the whole project.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NoReturn

from index.errors import RefusedError
from index.names import Distribution


@dataclass(frozen=True, kw_only=True)
class Defects:
    """Collects the defects of one file."""

    distribution: Distribution
    sentences: list[str] = field(default_factory=list)

    def note(self, cause: str, *, remedy: str) -> None:
        """Add a defect that affects only this file.

        Raises:
            RefusedError: the file is a new upload.
        """
        if not self.distribution.published:
            raise RefusedError(f"{self.distribution.filename}: {cause}", remedy=remedy)
        self.sentences.append(cause)

    def refuse(self, cause: str, *, remedy: str) -> NoReturn:
        """Refuse the file, since installers would fail on the whole project.

        Raises:
            RefusedError: always.
        """
        raise RefusedError(
            f"{self.distribution.filename}: {cause}",
            remedy=f"{remedy}; with this file, installers fail on every release of the project",
        )
