"""Programs that maintainers run by hand. The other programs do not import them."""
