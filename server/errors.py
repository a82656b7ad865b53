"""The error tree: engines.errors, continued with the errors of HTTP and of the start.

    SprintError
    ├── SettingsError            a flag or an environment variable is unknown or has a bad value; the start stops
    ├── ListenError              the address or the port cannot be bound; the start stops
    ├── BuildFailedError         a build produced no engine; PyTorch serves instead
    ├── RequestError             answered with `status`, a `code` for programs and a sentence for people
    │   ├── UnauthorizedError        401  API keys are set and the request has none of them
    │   ├── HttpError                404, 405 and other statuses that routing raises
    │   ├── SlowBodyError            408  the body did not arrive in time
    │   ├── BodyTooLargeError        413  the body exceeds the limit; the server did not read all of it
    │   ├── MediaTypeError           415  the route does not read this media type
    │   ├── InvalidError             422  a value is not allowed; `field_errors` name field and value
    │   │   └── ContentPolicyError       422  a checker refuses the prompt or the result
    │   ├── QueueFullError           429  refused at once, with Retry-After
    │   ├── ClientGoneError          499  the client disconnected; logged and counted, never sent
    │   ├── EngineError              500  the engine failed on this job
    │   ├── UnavailableError         503  not ready, draining, or the engine does not respond
    │   ├── SafetyError              503  a checker failed, so the result is withheld
    │   └── DeadlineError            504  the deadline passed before the job ran
    └── SessionEndError          the server ends a live session, with a close code

Exit codes of `python -m server` are below; orchestrators distinguish failures by them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Literal, Self

from engines.errors import JobError, SprintError

EXIT_SETTINGS = 2  # as argparse does
EXIT_START = 3  # the checkpoint or the engine could not be loaded or warmed up
EXIT_LISTEN = 4  # the address or the port cannot be bound
EXIT_HANG = 70  # a batch ran longer than --batch-timeout-s
EXIT_ENGINE = 71  # the engine fails on its own warm-up job, or its thread died

CLIENT_GONE = 499

# Close codes of WS /v1/live: those of RFC 6455 where it defines one.
CLOSE_GONE = 1006  # never sent: the client disconnected without a close frame
CLOSE_SLOW = 1008
CLOSE_ENGINE = 1011
CLOSE_RESTART = 1012
CLOSE_BUSY = 1013
CLOSE_IDLE = 4408

SIZE_FIELDS = ("width", "height", "width x height", "size")


class SettingsError(SprintError):
    """A setting is unknown or has a bad value. The message is one line: name, value and what is allowed."""


class ListenError(SprintError):
    """The address or the port cannot be bound. The message is one line: both, and the system's error."""


class BuildFailedError(SprintError):
    """A build produced no engine. `retryable`: the cause is external (killed, disk full), a new build may succeed."""

    def __init__(self, reason: str, *, retryable: bool) -> None:
        super().__init__(reason)
        self.retryable = retryable


@dataclass(frozen=True, slots=True)
class FieldError:
    """One bad value: its field, and a sentence with the value and what is allowed."""

    field: str
    detail: str


class RequestError(SprintError):
    """A request that the server answers with an error."""

    status = 500
    code = "internal_error"

    def __init__(self, detail: str, *, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.headers = headers or {}

    @property
    def title(self) -> str:
        return "Client Closed Request" if self.status == CLIENT_GONE else HTTPStatus(self.status).phrase


class UnauthorizedError(RequestError):
    status = 401
    code = "invalid_api_key"

    def __init__(self, detail: str) -> None:
        super().__init__(detail, headers={"www-authenticate": "Bearer"})


class HttpError(RequestError):
    """404, 405 and other statuses that routing raises."""

    def __init__(
        self, status: int, detail: str, *, headers: dict[str, str] | None = None, code: str | None = None
    ) -> None:
        super().__init__(detail, headers=headers)
        self.status = status
        self.code = code or HTTPStatus(status).name.lower()


class SlowBodyError(RequestError):
    status = 408
    code = "body_timeout"


class BodyTooLargeError(RequestError):
    status = 413
    code = "body_too_large"


class MediaTypeError(RequestError):
    status = 415
    code = "unsupported_media_type"


class InvalidError(RequestError):
    status = 422
    code = "invalid_value"

    def __init__(self, field_errors: Sequence[FieldError]) -> None:
        super().__init__("; ".join(item.detail for item in field_errors))
        self.field_errors = tuple(field_errors)
        if any(item.field in SIZE_FIELDS for item in field_errors):
            self.code = "invalid_size"

    @classmethod
    def from_job_error(cls, error: JobError) -> Self:
        """Converts an engine's refusal, whose message begins with the field (engines.types.Limits.check)."""
        return cls([FieldError(str(error).partition(":")[0], str(error))])


class ContentPolicyError(InvalidError):
    """`what` is the refused part."""

    code = "content_policy_violation"

    def __init__(self, what: Literal["prompt", "image"], reason: str) -> None:
        remedy = "; another prompt or seed may do" if what == "image" else ""
        super().__init__([FieldError(what, f"{what}: refused by this server's content policy: {reason}{remedy}")])


class QueueFullError(RequestError):
    status = 429
    code = "queue_full"

    def __init__(self, detail: str, retry_after_s: int) -> None:
        super().__init__(detail, headers={"retry-after": str(retry_after_s)})


class ClientGoneError(RequestError):
    status = CLIENT_GONE
    code = "client_gone"


class EngineError(RequestError):
    status = 500
    code = "engine_failed"


class UnavailableError(RequestError):
    """503 with the `code` not_ready, draining or engine_hung. `building`: progress of the engine under construction."""

    status = 503

    def __init__(
        self, detail: str, *, code: str, retry_after_s: int, building: dict[str, object] | None = None
    ) -> None:
        # A load balancer that kept this connection would send its retry to the same server.
        super().__init__(detail, headers={"retry-after": str(retry_after_s), "connection": "close"})
        self.code = code
        self.building = building


class SafetyError(RequestError):
    status = 503
    code = "safety_check_failed"

    def __init__(self, what: Literal["prompt", "image"]) -> None:
        detail = f"the check of the {what} failed, so nothing is shown; try again after Retry-After seconds"
        super().__init__(detail, headers={"retry-after": "1"})


class DeadlineError(RequestError):
    status = 504
    code = "deadline_exceeded"


class SessionEndError(SprintError):
    """Ends a live session: `code` for programs, a sentence for people, a close code for the websocket."""

    def __init__(self, code: str, detail: str, close_code: int) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.close_code = close_code
