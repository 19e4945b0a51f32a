"""What a recipe or stack says of one download: its digest, or why that is not known yet, and who vouches for it."""

from __future__ import annotations

from datetime import date
from typing import Self

from pydantic import Field, model_validator

from gracefarm.tables import Sha256, Table, Url


class Witness(Table):
    """An independent source for the same digest."""

    source: str = Field(min_length=1, description="Address, or document and place, of the digest")
    value: Sha256 = Field(description="Digest in that source; it must equal `sha256`")


class FirstUse(Table):
    """A digest that was read at first use from the address of the file itself."""

    date: date
    "Day on which the digest was read."
    url: Url = Field(description="Address of the file")


class DigestFields(Table):
    """The keys of a download that is pinned by sha256, or whose sha256 is still unknown."""

    sha256: Sha256 | None = None
    "sha256 of the file; absent while it is unknown."
    sha256_unknown: str | None = Field(
        default=None, description="Why the digest is unknown; fill it in with `builder lock` or `builder build --accept-new`"
    )
    accepted: FirstUse | None = Field(
        default=None,
        description="Written by `--accept-new`; the digest is unconfirmed until there is a witness",
    )
    witness: tuple[Witness, ...] = Field(default=(), description="Independent sources of this digest")

    @property
    def unconfirmed(self) -> FirstUse | None:
        """When and where the digest was first read, while that is all that speaks for it."""
        return None if self.witness else self.accepted

    @model_validator(mode="after")
    def _evidence_is_of_this_digest(self) -> Self:
        if self.sha256 is None and (self.accepted is not None or self.witness):
            raise ValueError("accepted and witness are about a digest: give sha256")
        for witness in self.witness:
            if witness.value != self.sha256:
                raise ValueError(f"witness {witness.source} says {witness.value}, which is another digest")
        return self

    def require_one(self) -> None:
        """Refuse both and neither of a digest and the reason for its absence.

        Raises:
            ValueError: both or none are given.
        """
        if (self.sha256 is None) == (self.sha256_unknown is None):
            raise ValueError("give sha256, or in sha256_unknown the reason why it is not known yet, and not both")


class PinnedDownload(DigestFields):
    """One that always has a digest, or a reason."""

    @model_validator(mode="after")
    def _one_digest(self) -> Self:
        self.require_one()
        return self
