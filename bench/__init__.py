"""Benchmarks, which often compare a program with its alternatives. docs/explanation/benchmarks.md has results and commands."""
