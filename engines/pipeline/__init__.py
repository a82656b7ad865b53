"""A batch through text, denoise and decode: the engine that serves."""
