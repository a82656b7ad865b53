"""Triton kernels of the GPU path, one file each, beside the PyTorch reference that they are compared with."""
