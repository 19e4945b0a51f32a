"""What a build stands on: the Debian root, the environment with torch, CUDA's packages, uv."""
