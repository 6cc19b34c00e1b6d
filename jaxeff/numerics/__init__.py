"""Arithmetic that does not depend on networks."""
