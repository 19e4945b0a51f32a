"""Web pages for people, rendered on the server, and the static export."""
