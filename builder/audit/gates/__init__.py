"""Gates: a module for each, with the gate's name in records and docs/reference/audit.md."""
