"""The error of a benchmark; continues the tree of engines.errors."""

from engines.errors import SprintError


class BenchError(SprintError):
    """A measurement cannot be made: the message says what was got and what is needed."""
