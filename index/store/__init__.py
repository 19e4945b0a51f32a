"""What the index keeps: the catalogue, files by their digest, tokens, records."""
