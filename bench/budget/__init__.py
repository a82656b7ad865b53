"""What a request costs on a GPU, counted from the engine as it is built."""
