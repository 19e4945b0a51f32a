"""The simple API: which files a page shows, and its bytes in each form."""
