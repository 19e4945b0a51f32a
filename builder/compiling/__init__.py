"""Build a wheel from a source tree with PEP 517: the run, the number of jobs, the translation units."""
