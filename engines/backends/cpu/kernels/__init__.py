"""Kernels in C (c/), a file of callers for each; found compiled, or compiled once."""
