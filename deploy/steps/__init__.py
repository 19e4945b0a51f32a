"""What `deploy up`, `serve` and `down` do, a noun a module; deploy/flow.py has the order."""
