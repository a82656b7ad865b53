"""HTTP in front of an engine: schemas, queue, deadlines, metrics. Imports no torch."""

__version__ = "0.2.0"
