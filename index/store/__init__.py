"""The data of the index: the catalogue, files by digest, tokens, records."""
