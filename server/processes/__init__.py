"""The serving process: uvicorn with drain and limits, supervisor and workers, malloc."""
