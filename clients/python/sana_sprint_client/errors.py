"""The error tree: SanaSprintError, and below it errors of the server and of the connection."""

from dataclasses import dataclass
from typing import Any


class SanaSprintError(Exception):
    """Root of every error that this package raises on purpose."""


class ConnectionFailedError(SanaSprintError):
    """The server is not reachable, or the connection ended without a response."""


@dataclass(frozen=True, slots=True)
class FieldError:
    """An invalid field of the request, with the value and the allowed ones in `detail`."""

    field: str
    detail: str


class GenerationError(SanaSprintError):
    """The server answered with an error; `code` is for programs (queue_full, content_policy_violation, ...).

    `field_errors` are those of a 422. `request_id` is the one in the server's log.
    """

    def __init__(self, status: int, problem: dict[str, Any]) -> None:
        self.status = status
        self.code = str(problem.get("code", ""))
        self.detail = str(problem.get("detail", ""))
        self.request_id = str(problem.get("request_id", ""))
        self.field_errors = tuple(FieldError(item["field"], item["detail"]) for item in problem.get("errors", ()))
        super().__init__(f"{status} {self.code}: {self.detail}")
