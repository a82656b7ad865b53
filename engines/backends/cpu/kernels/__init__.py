"""Kernels in C, one source each, beside what calls them; found compiled, or compiled once."""
