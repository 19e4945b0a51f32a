"""Accepting a file: upload forms, archives, wheels, sdists, and the checks before a file is accepted."""
