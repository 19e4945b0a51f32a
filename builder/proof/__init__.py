"""The documents of a build: record, SBOM, provenance, signatures, publication; and their checks."""
