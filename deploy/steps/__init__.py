"""What `deploy up`, `serve` and `down` do, a noun a module; deploy/steps/order.py has the order."""
