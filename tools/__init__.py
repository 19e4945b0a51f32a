"""What maintainers run by hand; no program imports it."""
