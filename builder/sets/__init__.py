"""Sets: wheels that are tested together and published together, with their lock."""
