"""The engine's module of kernels; empty in the simulation."""
