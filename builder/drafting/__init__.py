"""Draft a recipe from a source: read where the source says a value, guessed elsewhere. Nothing of the package is run."""
