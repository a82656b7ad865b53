"""The tiny world: scenes, captions, renderings, sketches, the judge."""
