"""Kernels of the autoencoder: convolutions and norms on zero-bordered images."""
