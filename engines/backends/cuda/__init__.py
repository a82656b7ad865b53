"""What runs on NVIDIA GPUs without a vendor's compiler."""
