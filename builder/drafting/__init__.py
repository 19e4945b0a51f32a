"""Draft a recipe from a source: values are read from the source, or guessed. Nothing of the package is run."""
