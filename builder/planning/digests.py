"""The digest of a download in a recipe or stack: its value, or why it is unknown, and the sources that confirm it."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Self

from pydantic import Field, model_validator

from gracefarm.tables import Sha256, Table, Url


class Witness(Table):
    """A document that publishes the same digest, and that does not depend on the download."""

    source: str = Field(min_length=1)
    "URL of the publication, or the name of a document and the place in it"
    value: Sha256
    "Digest in the publication. It must be equal to `sha256`"


class FirstUse(Table):
    """The day on which `--accept-new` computed the digest, and the URL of the file."""

    date: Annotated[date, Field(description="Day on which the digest was computed")]
    url: Url
    "URL of the file"


class DigestFields(Table):
    """The keys of a download that is pinned by sha256, or whose sha256 is still unknown."""

    sha256: Sha256 | None = None
    "sha256 of the file. Give this key, or `sha256_unknown` if you do not know the digest"
    sha256_unknown: str | None = None
    "Reason why the digest is unknown. `builder lock` or `builder build --accept-new` replaces this key with `sha256`"
    accepted: FirstUse | None = None
    "Date and URL of the download from which `--accept-new` computed `sha256`. The builder writes this table"
    witness: tuple[Witness, ...] = ()
    (
        "Documents that publish the same digest. If `--accept-new` computed the digest and there is no witness, the digest is "
        "unconfirmed in the output of `builder plan` and in the record"
    )

    @property
    def unconfirmed(self) -> FirstUse | None:
        """When and where the digest was read at first use, if no witness confirms it."""
        return None if self.witness else self.accepted

    @model_validator(mode="after")
    def _evidence_is_of_this_digest(self) -> Self:
        if self.sha256 is None and (self.accepted is not None or self.witness):
            raise ValueError("the keys accepted and witness require the key sha256")
        for witness in self.witness:
            if witness.value != self.sha256:
                raise ValueError(f"the witness {witness.source} has the digest {witness.value}, which differs from sha256")
        return self

    def require_one(self) -> None:
        """Require either a digest or the reason for its absence.

        Raises:
            ValueError: both or neither are given.
        """
        if (self.sha256 is None) == (self.sha256_unknown is None):
            raise ValueError("give either sha256, or sha256_unknown with the reason why the digest is unknown")


class PinnedDownload(DigestFields):
    """A download that must have a digest or a reason for its absence."""

    @model_validator(mode="after")
    def _one_digest(self) -> Self:
        self.require_one()
        return self
