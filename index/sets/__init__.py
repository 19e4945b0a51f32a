"""Sets of wheels that become visible at once, and the third-party wheels that belong to them."""
