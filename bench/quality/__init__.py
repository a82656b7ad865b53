"""The cost of precisions, decoders and steps in image quality: scores with intervals, and fp8's sensitivity."""
