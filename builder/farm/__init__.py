"""Cells on a Ray cluster: which workers it has, what they are sent, what comes back. docs/howto/farm.md shows it."""
