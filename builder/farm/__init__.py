"""Build cells on a Ray cluster: find its workers, send them cells, receive the results. See docs/howto/farm.md."""
