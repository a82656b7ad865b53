"""The model on NVIDIA GPUs without a vendor's compiler: cuBLAS for products, engines.kernels for the rest, graphs."""
