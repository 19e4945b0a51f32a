"""Speed, measured beside what a user would take instead; docs/benchmarks.md holds the figures and the commands."""
