"""Observes a deployment: status, top, logs, collect. This package does not change the nodes."""
