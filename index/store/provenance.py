"""The provenance of a file (PEP 740): attestations of its publisher, verified at upload."""

from __future__ import annotations

import hashlib

from index.store.catalogue import Transaction
from index.store.files import Store

SUFFIX = ".provenance"
"Suffix of a file's address that gives its provenance."


def keep(store: Store, change: Transaction, filename: str, provenance: bytes) -> None:
    """Store the first provenance of the file; later ones are ignored."""
    row = change.execute("SELECT project FROM file WHERE filename = ? AND provenance_sha256 IS NULL", (filename,)).fetchone()
    if row is None:
        return
    digest = hashlib.sha256(provenance).hexdigest()
    store.add_bytes(provenance, digest)
    change.execute("UPDATE file SET provenance_sha256 = ? WHERE filename = ?", (digest, filename))
    change.note("file.attest", filename, row["project"], sha256=digest)
