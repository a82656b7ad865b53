"""Triton kernels of the GPU path, one file each, with their PyTorch references."""
