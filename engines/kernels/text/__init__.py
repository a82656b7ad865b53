"""Kernels of the text encoder."""
