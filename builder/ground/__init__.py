"""What a build runs in: the Debian root, the environment with torch, the CUDA packages, uv."""
