"""The model on a CPU: oneDNN's products and convolutions, 8 bits, and kernels in C."""
