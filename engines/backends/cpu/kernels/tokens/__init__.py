"""Our C kernels for the tokens of one image: what the transformer does between two products."""
