"""What a measurement raises on purpose; continues the tree of engines.errors."""

from engines.errors import SprintError


class BenchError(SprintError):
    """A measurement cannot be made as asked: what was got, what is needed."""
