"""Speak with an engine that runs: a canary, completions, its metrics and its log."""
