"""Native engines on disk: modules laid out for our kernels, and the kernels compiled ahead for their card."""
