"""A GPU host's server measured over HTTP, with diffusers' figures and projections for comparison."""
