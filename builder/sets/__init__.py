"""Sets: wheels that are tested and published together, with their lock."""
