"""A kit for acceptance on a GPU host without network: its packing, and the programs that run there."""
