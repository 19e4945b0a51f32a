"""Attestations of a file (PEP 740): verified with Sigstore against the publishers of its project, kept as its provenance."""

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
"Attestations of one file, one of each type that PyPI knows: who published it, and how it was built (SLSA)."

SIGSTORE = "tuf-repo-cdn.sigstore.dev"
"Where Sigstore's current keys come from, when they may be asked for."

_REMEDY = "upload without attestations, or with those that the publisher of this file made"


@dataclass(kw_only=True)
class AttestationVerifier:
    """Verifies attestations, one at a time: Sigstore's keys are files of this user that must not be written twice at once.

    pypi_attestations is imported with the first attestation: it takes a second, and most servers never see one.
    """

    offline: bool = False
    "Use the keys that are on this machine, or that came with sigstore; ask for no newer ones."
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def provenance(self, text: str, filename: str, sha256: str, publishers: Sequence[TrustedPublisher]) -> bytes:
        """The provenance object of a file (PEP 740), once each of its attestations is good.

        `text` is the form's field `attestations`: a JSON array. Call it off the event loop.

        Raises:
            RefusedError: an attestation cannot be read, is damaged, is of another file, or of no publisher of the project.
            UnreachableError: Sigstore's keys cannot be fetched.
        """
        from pydantic import TypeAdapter, ValidationError
        from pypi_attestations import Attestation, AttestationBundle, Distribution, Provenance

        try:
            distribution = Distribution(name=filename, digest=sha256)
        except ValidationError:  # an attestation's subject is the file's own name, which pypi_attestations cannot read
            raise RefusedError(
                f"attestations of {filename} cannot be verified: pypi_attestations reads no names of variant wheels",
                remedy="upload this file without attestations",
            ) from None
        try:
            attestations = TypeAdapter(list[Attestation]).validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(str(part) for part in first["loc"])
            raise RefusedError(f"the attestations cannot be read: {place}: {first['msg']}", remedy=_REMEDY) from None
        if not 1 <= len(attestations) <= MOST:
            raise RefusedError(f"the form has {len(attestations)} attestations, of which 1 to {MOST} may be", remedy=_REMEDY)
        identities = [identity for publisher in publishers if (identity := _identity(publisher)) is not None]
        if not identities:
            raise RefusedError(
                "this project has no publisher whose attestations could be verified",
                remedy="name one with `index publisher add`, or upload without attestations",
            )
        bundles: dict[str, AttestationBundle] = {}
        types: set[str] = set()
        with self._lock:
            for attestation in attestations:
                identity, kind = self._verified(attestation, distribution, identities)
                if kind in types:
                    raise RefusedError(f"two attestations are of the type {kind}", remedy=_REMEDY)
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
        """The first publisher whose attestation it is, and the type of its statement."""
        from pypi_attestations import AttestationError
        from sigstore.errors import Error, TUFError

        logging.getLogger("sigstore").setLevel(logging.ERROR)  # it warns at every call that it does not ask for newer keys
        reasons: list[str] = []
        for identity in identities:
            try:
                return identity, attestation.verify(identity, distribution, offline=self.offline)[0]
            except TUFError as error:
                raise UnreachableError(
                    f"the attestations cannot be verified: {SIGSTORE}, which has Sigstore's keys, did not answer ({error})",
                    remedy="try again, or run `index serve --sigstore-offline`, which uses the keys that are here",
                ) from None
            except (AttestationError, Error, ValueError) as error:
                reasons.append(str(error).splitlines()[0].removeprefix("Verification failed: ")[:300])
        why = "; ".join(dict.fromkeys(reasons))
        raise RefusedError(f"an attestation of {distribution.name} is not good: {why}", remedy=_REMEDY)


def _identity(publisher: TrustedPublisher) -> GitHubPublisher | GitLabPublisher | None:
    """The publisher as Sigstore's certificates name it; None for an issuer that Sigstore does not know.

    The environment stays out of it: a certificate does not name one, so nobody could have checked it.
    """
    from pypi_attestations import GitHubPublisher, GitLabPublisher

    if publisher.issuer == GITHUB:
        return GitHubPublisher(repository=publisher.repository, workflow=publisher.workflow)
    if publisher.issuer == GITLAB:
        return GitLabPublisher(repository=publisher.repository, workflow_filepath=publisher.workflow)
    return None
