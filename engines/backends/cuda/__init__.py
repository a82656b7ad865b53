"""The model on an NVIDIA GPU: products by cuBLAS, the rest by engines.kernels."""
