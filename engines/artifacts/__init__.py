"""Built engines on disk: manifest, reference, loading."""
