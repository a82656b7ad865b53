"""The error tree, continued from engines.errors with what only HTTP knows.

    SprintError
    ├── SettingsError            a flag or an environment variable is unknown or has a bad value; the start stops
    ├── ListenError              the address or the port cannot be had; the start stops
    ├── BuildFailedError         no engine came of a build; PyTorch serves instead
    ├── RequestError             a request is answered with `status`, a `code` for programs and a sentence for people
    │   ├── UnauthorizedError        401  API keys are set and the request carries none of them
    │   ├── HttpError                404, 405 and the rest of plain HTTP: routing raises these
    │   ├── SlowBodyError            408  the body did not arrive in time
    │   ├── BodyTooLargeError        413  the body is over the limit; it was not read whole
    │   ├── MediaTypeError           415  the body is of another type than the route reads
    │   ├── InvalidError             422  a value is not allowed; `faults` name field, value and what is allowed
    │   │   └── ContentPolicyError       422  a checker refuses the prompt, or the image that was made
    │   ├── QueueFullError           429  refused at once, with the seconds after which a retry makes sense
    │   ├── ClientGoneError          499  the client left; logged and counted, never sent
    │   ├── EngineError              500  the engine failed on this job
    │   ├── UnavailableError         503  not ready yet, draining, or the engine does not answer
    │   ├── SafetyError              503  a checker failed, so that nothing may be shown
    │   └── DeadlineError            504  the deadline passed before the job ran
    └── SessionEndError          the server ends a live session, with a close code

Exit codes of `python -m server`, so that an orchestrator can tell the cases apart, stand below.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Literal, Self

from engines.errors import JobError, SprintError

EXIT_SETTINGS = 2  # as argparse does
EXIT_START = 3  # the checkpoint or the engine could not be loaded or warmed up
EXIT_LISTEN = 4  # the address or the port cannot be had
EXIT_HANG = 70  # a batch ran longer than --batch-timeout-s
EXIT_ENGINE = 71  # the engine fails on its own warm-up job, or its thread died

CLIENT_GONE = 499

# Close codes of WS /v1/live: of RFC 6455 where it has one.
CLOSE_GONE = 1006  # never sent: the client left without a word
CLOSE_SLOW = 1008
CLOSE_ENGINE = 1011
CLOSE_RESTART = 1012
CLOSE_BUSY = 1013
CLOSE_IDLE = 4408

SIZE_FIELDS = ("width", "height", "width x height", "size")


class SettingsError(SprintError):
    """A setting is unknown or has a bad value. One line: name, value and what is allowed."""


class ListenError(SprintError):
    """The address or the port cannot be had. One line: both, and what the system said."""


class BuildFailedError(SprintError):
    """No engine came of a build. `again`: its cause lies outside of it (killed, disk full), another try may do."""

    def __init__(self, reason: str, *, again: bool) -> None:
        super().__init__(reason)
        self.again = again


@dataclass(frozen=True, slots=True)
class Fault:
    """One bad value: the field, and a sentence with the value that was got and what is allowed."""

    field: str
    detail: str


class RequestError(SprintError):
    """A request that is not answered with a picture."""

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
    """What routing refuses: 404, 405 and whatever else plain HTTP says."""

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

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__("; ".join(fault.detail for fault in faults))
        self.faults = tuple(faults)
        if any(fault.field in SIZE_FIELDS for fault in faults):
            self.code = "invalid_size"

    @classmethod
    def of_job(cls, error: JobError) -> Self:
        """What the engine refuses; its messages begin with the field (engines.types.Limits.check)."""
        return cls([Fault(str(error).partition(":")[0], str(error))])


class ContentPolicyError(InvalidError):
    """`what` is prompt or image: what was refused."""

    code = "content_policy_violation"

    def __init__(self, what: Literal["prompt", "image"], reason: str) -> None:
        remedy = "; another prompt or seed may do" if what == "image" else ""
        super().__init__([Fault(what, f"{what}: refused by this server's content policy: {reason}{remedy}")])


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
    """503. `code` tells which: not_ready, draining, engine_hung. `building`: how far an engine is that is built."""

    status = 503

    def __init__(
        self, detail: str, *, code: str, retry_after_s: int, building: dict[str, object] | None = None
    ) -> None:
        # Nothing will come of this connection: a balancer that keeps it open would ask the same server again.
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
    """A live session is over: `code` for programs, a sentence for people, a close code for the websocket."""

    def __init__(self, code: str, detail: str, close_code: int) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.close_code = close_code
