"""What the text encoder alone needs."""
