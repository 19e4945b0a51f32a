"""The kinds of toolchain, and what they add to a build: compilers, wrappers, environment variables."""
