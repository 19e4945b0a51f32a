"""From a recipe to a proven, published wheel."""
