"""The HTTP application and the server that runs it."""
