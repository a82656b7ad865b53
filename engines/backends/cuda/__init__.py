"""The model on NVIDIA GPUs without a vendor's compiler: cuBLAS products, engines.kernels and CUDA graphs."""
