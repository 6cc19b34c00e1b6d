"""Arithmetic that knows nothing of networks. Imports nothing of jaxeff."""
