"""Compile a wheel: analyse the source, choose the number of jobs, run the command, count the translation units."""
