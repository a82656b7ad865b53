"""TensorRT, TensorRT for RTX and torch-tensorrt: compiling and running their engines."""
