"""HTTP in front of an engine: schemas, queue, deadlines, metrics. Imports no torch."""
