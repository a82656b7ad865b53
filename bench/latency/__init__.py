"""Our engine against diffusers, by stage."""
