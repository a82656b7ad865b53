"""Native engines on disk: modules laid out for our kernels, and kernels compiled ahead of time for a GPU."""
