"""The simple API: the files of a page, and its bytes in each format."""
