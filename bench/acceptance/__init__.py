"""Acceptance on a GPU host, run once."""
