"""Build wheels from recipes, test them, and publish them."""
