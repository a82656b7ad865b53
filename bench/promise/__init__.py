"""What a user of a GPU host waits for, over HTTP, beside diffusers and beside what was projected."""
