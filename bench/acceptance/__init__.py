"""What a GPU host runs once."""
