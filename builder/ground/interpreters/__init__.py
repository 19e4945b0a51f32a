"""Interpreters: the target's Python. Each kind has a module; builder.ground.interpreters.catalogue loads one by its name."""
