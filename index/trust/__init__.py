"""Whom a project trusts: its publishers, their identity tokens (PEP 807) and their attestations (PEP 740)."""
