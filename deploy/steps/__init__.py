"""The steps of `deploy up`, `serve` and `down`. deploy/steps/order.py has their order.

Modules without a class `...Step` are helpers.
"""
