"""Attestations of a file (PEP 740): verified with Sigstore against the project's publishers, and stored as its provenance."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from index.errors import RefusedError, UnreachableError
from index.trust.publishers import GITHUB, GITLAB, TrustedPublisher

if TYPE_CHECKING:
    from pypi_attestations import Attestation, Distribution, GitHubPublisher, GitLabPublisher

MOST = 2
"Maximum attestations of one file, one of each type that PyPI accepts: who published it, and how it was built (SLSA)."

SIGSTORE = "tuf-repo-cdn.sigstore.dev"
"Address of Sigstore's current keys."

_REMEDY = "upload the file without attestations, or attest it in the workflow of the project's publisher"


@dataclass(kw_only=True)
class AttestationVerifier:
    """Verifies attestations, one at a time, since two writers must not update the user's files of Sigstore keys.

    pypi_attestations is imported with the first attestation: the import takes a second, and most servers never need it.
    """

    offline: bool = False
    "Use the keys on this machine or those shipped with sigstore; do not fetch newer ones."
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def provenance(self, text: str, filename: str, sha256: str, publishers: Sequence[TrustedPublisher]) -> bytes:
        """Verify the attestations of a file and return its provenance object (PEP 740).

        `text` is the form's field `attestations`: a JSON array. Do not call it on the event loop.

        Raises:
            RefusedError: an attestation is unreadable, damaged, for another file, or not by a publisher of the project.
            UnreachableError: Sigstore's keys cannot be fetched.
        """
        from pydantic import TypeAdapter, ValidationError
        from pypi_attestations import Attestation, AttestationBundle, Distribution, Provenance

        try:
            distribution = Distribution(name=filename, digest=sha256)
        except (
            ValidationError
        ):  # the subject of an attestation is the file name, which pypi_attestations cannot parse for variant wheels
            raise RefusedError(
                f"cannot verify attestations of {filename}: pypi_attestations does not support names of variant wheels",
                remedy="upload this file without attestations",
            ) from None
        try:
            attestations = TypeAdapter(list[Attestation]).validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(str(part) for part in first["loc"])
            raise RefusedError(f"the attestations are malformed: {place}: {first['msg']}", remedy=_REMEDY) from None
        if not 1 <= len(attestations) <= MOST:
            raise RefusedError(f"the form has {len(attestations)} attestations; 1 to {MOST} are allowed", remedy=_REMEDY)
        identities = [identity for publisher in publishers if (identity := _identity(publisher)) is not None]
        if not identities:
            raise RefusedError(
                "this project has no publisher that can attest files",
                remedy="add a publisher with `index publisher add`, or upload without attestations",
            )
        bundles: dict[str, AttestationBundle] = {}
        types: set[str] = set()
        with self._lock:
            for attestation in attestations:
                identity, kind = self._verified(attestation, distribution, identities)
                if kind in types:
                    raise RefusedError(f"two attestations have the type {kind}", remedy=_REMEDY)
                types.add(kind)
                empty = AttestationBundle(publisher=identity, attestations=[])
                bundles.setdefault(identity.model_dump_json(), empty).attestations.append(attestation)
        return Provenance(attestation_bundles=list(bundles.values())).model_dump_json(exclude_none=True).encode()

    def _verified(
        self,
        attestation: Attestation,
        distribution: Distribution,
        identities: Sequence[GitHubPublisher | GitLabPublisher],
    ) -> tuple[GitHubPublisher | GitLabPublisher, str]:
        """The first publisher that made the attestation, and the type of its statement."""
        from pypi_attestations import AttestationError
        from sigstore.errors import Error, TUFError

        logging.getLogger("sigstore").setLevel(logging.ERROR)  # in offline mode it warns at every call
        reasons: list[str] = []
        for identity in identities:
            try:
                return identity, attestation.verify(identity, distribution, offline=self.offline)[0]
            except TUFError as error:
                raise UnreachableError(
                    f"cannot verify the attestations: {SIGSTORE}, which serves Sigstore's keys, did not respond ({error})",
                    remedy="try again, or run `index serve --sigstore-offline`, which uses the keys on this machine",
                ) from None
            except (AttestationError, Error, ValueError) as error:
                reasons.append(str(error).splitlines()[0].removeprefix("Verification failed: ")[:300])
        why = "; ".join(dict.fromkeys(reasons))
        raise RefusedError(f"an attestation of {distribution.name} is not valid: {why}", remedy=_REMEDY)


def _identity(publisher: TrustedPublisher) -> GitHubPublisher | GitLabPublisher | None:
    """The publisher as named in Sigstore's certificates; None for an issuer that Sigstore does not know.

    The environment is omitted: certificates do not name it, so it cannot be verified.
    """
    from pypi_attestations import GitHubPublisher, GitLabPublisher

    if publisher.issuer == GITHUB:
        return GitHubPublisher(repository=publisher.repository, workflow=publisher.workflow)
    if publisher.issuer == GITLAB:
        return GitLabPublisher(repository=publisher.repository, workflow_filepath=publisher.workflow)
    return None
