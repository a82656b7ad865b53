"""Compiles and runs engines of TensorRT, TensorRT for RTX and torch-tensorrt."""
