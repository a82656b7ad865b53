"""The error tree: SanaSprintError, and below it refusals of the server and failed connections."""

from dataclasses import dataclass
from typing import Any


class SanaSprintError(Exception):
    """Root of every error that this package raises on purpose."""


class ConnectionFailedError(SanaSprintError):
    """No answer came: the server is not there, or the connection ended."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One bad value: the field, and a sentence with what was got and what is allowed."""

    field: str
    detail: str


class GenerationError(SanaSprintError):
    """The server answered with an error; `code` is for programs (queue_full, content_policy_violation, ...).

    `faults` name the fields of a 422. `request_id` is what the server's log has.
    """

    def __init__(self, status: int, problem: dict[str, Any]) -> None:
        self.status = status
        self.code = str(problem.get("code", ""))
        self.detail = str(problem.get("detail", ""))
        self.request_id = str(problem.get("request_id", ""))
        self.faults = tuple(Fault(fault["field"], fault["detail"]) for fault in problem.get("errors", ()))
        super().__init__(f"{status} {self.code}: {self.detail}")
