"""The same engine behind FastAPI, LitServe, Ray Serve, BentoML."""
