"""Error answers: application/problem+json (RFC 9457), or OpenAI's envelope on OpenAI's routes."""

from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from server.errors import HttpError, InvalidError, RequestError, UnavailableError

MEDIA_TYPE = "application/problem+json"
OWN_V1_PATHS = ("/v1/info", "/v1/live")  # our own paths under OpenAI's prefix

EXPLANATIONS = {
    404: "no such path; GET /docs lists them",
    405: "this path does not take this method; the Allow header lists those it takes",
}


def uses_openai_envelope(path: str) -> bool:
    """Returns True for paths of OpenAI's API."""
    return path.startswith("/v1/") and path not in OWN_V1_PATHS


def from_http_exception(error: HTTPException) -> RequestError:
    """Converts an HTTPException of routing to a RequestError."""
    phrase = HTTPStatus(error.status_code).phrase
    detail = EXPLANATIONS.get(error.status_code, "") if error.detail == phrase else str(error.detail)
    return HttpError(error.status_code, detail or phrase, headers=dict(error.headers or {}))


def response(error: RequestError, *, path: str, request_id: str) -> JSONResponse:
    """Returns the answer for a RequestError."""
    field_errors = error.field_errors if isinstance(error, InvalidError) else ()
    if uses_openai_envelope(path):
        error_type = "server_error" if error.status >= 500 else "invalid_request_error"
        if error.status == 429:
            error_type = "rate_limit_error"
        param = field_errors[0].field if field_errors else None
        envelope = {"message": error.detail, "type": error_type, "param": param, "code": error.code}
        return JSONResponse({"error": envelope}, status_code=error.status, headers=error.headers)
    problem: dict[str, Any] = {
        "title": error.title,
        "status": error.status,
        "detail": error.detail,
        "instance": path,
        "code": error.code,
        "request_id": request_id,
    }
    if field_errors:
        problem["errors"] = [
            {"field": item.field, "pointer": f"#/{item.field}", "detail": item.detail} for item in field_errors
        ]
    if isinstance(error, UnavailableError) and error.building is not None:
        problem["building"] = error.building
    return JSONResponse(problem, status_code=error.status, headers=error.headers, media_type=MEDIA_TYPE)
