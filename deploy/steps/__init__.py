"""What `deploy up`, `serve` and `down` do, a noun a module; deploy/steps/flow.py has the order."""
