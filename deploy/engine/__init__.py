"""Communicates with a running engine: canary, completions, metrics, log."""
