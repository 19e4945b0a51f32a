"""Where foreign code runs: the sandbox, its supervisor, the memory meter and the network recorder."""
