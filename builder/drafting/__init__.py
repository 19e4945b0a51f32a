"""A recipe for a package that has none yet: read from its source where that says it, guessed elsewhere. Nothing is run."""
