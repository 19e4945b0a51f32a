"""From a source tree to a wheel by PEP 517: the run, the number of jobs, the translation units."""
