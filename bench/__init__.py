"""Speed, measured beside what a user would take instead; docs/explanation/benchmarks.md holds the figures and the commands."""
