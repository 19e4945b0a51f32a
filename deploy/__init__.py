"""Serve a model on a list of nodes."""
