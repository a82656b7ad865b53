"""Counts the cost of a request on a GPU from the engine as it is built."""
