"""Arithmetic that knows nothing of networks."""
