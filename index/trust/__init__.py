"""Trusted publishers of a project, their identity tokens (PEP 807) and their attestations (PEP 740)."""
