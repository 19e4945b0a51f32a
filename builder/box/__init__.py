"""Execution of untrusted code: the sandbox, its supervisor, the memory meter and the network recorder."""
