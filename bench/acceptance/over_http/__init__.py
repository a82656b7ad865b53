"""A GPU host's server measured over HTTP, beside diffusers and beside what was projected."""
