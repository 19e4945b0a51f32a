"""Keeping a machine ready to build: `builder doctor` and `builder clean`."""
