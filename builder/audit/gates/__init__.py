"""Gates: one module each, called as its gate in records and docs/reference/audit.md."""
