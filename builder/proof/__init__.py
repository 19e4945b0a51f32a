"""What a build leaves behind: record, SBOM, provenance, signatures, publication, and their checks."""
