"""Measures the speed of a served model."""
