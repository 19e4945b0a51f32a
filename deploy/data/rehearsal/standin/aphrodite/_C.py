"""The engine's kernels have this name; here are none."""
