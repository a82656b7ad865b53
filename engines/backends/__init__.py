"""Backends: each executes one module and returns a callable that replaces it."""
