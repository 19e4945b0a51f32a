"""What a deployment does now: status, top, logs, collect. Nothing here changes a node."""
