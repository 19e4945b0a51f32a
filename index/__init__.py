"""The package index that serves the wheels."""
