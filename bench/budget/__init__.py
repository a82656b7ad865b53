"""The cost of a request on a GPU, counted from the engine as it is built."""
