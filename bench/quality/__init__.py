"""What precisions, decoders and steps cost in images: scores with intervals, and the cost of fp8."""
