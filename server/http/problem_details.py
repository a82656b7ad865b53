"""How an error looks on the wire: application/problem+json (RFC 9457), or OpenAI's envelope on OpenAI's routes."""

from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from server.errors import HttpError, InvalidError, RequestError, UnavailableError

MEDIA_TYPE = "application/problem+json"
OWN_V1_PATHS = ("/v1/info", "/v1/live")  # ours, under OpenAI's prefix

EXPLANATIONS = {
    404: "no such path; GET /docs lists them",
    405: "this path does not take this method; the Allow header lists those it takes",
}


def uses_openai_envelope(path: str) -> bool:
    return path.startswith("/v1/") and path not in OWN_V1_PATHS


def from_http_exception(error: HTTPException) -> RequestError:
    """What routing raises, in our tree."""
    phrase = HTTPStatus(error.status_code).phrase
    detail = EXPLANATIONS.get(error.status_code, "") if error.detail == phrase else str(error.detail)
    return HttpError(error.status_code, detail or phrase, headers=dict(error.headers or {}))


def response(error: RequestError, *, path: str, request_id: str) -> JSONResponse:
    """The answer to a request that failed."""
    faults = error.faults if isinstance(error, InvalidError) else ()
    if uses_openai_envelope(path):
        kind = "server_error" if error.status >= 500 else "invalid_request_error"
        if error.status == 429:
            kind = "rate_limit_error"
        param = faults[0].field if faults else None
        envelope = {"message": error.detail, "type": kind, "param": param, "code": error.code}
        return JSONResponse({"error": envelope}, status_code=error.status, headers=error.headers)
    problem: dict[str, Any] = {
        "title": error.title,
        "status": error.status,
        "detail": error.detail,
        "instance": path,
        "code": error.code,
        "request_id": request_id,
    }
    if faults:
        problem["errors"] = [
            {"field": fault.field, "pointer": f"#/{fault.field}", "detail": fault.detail} for fault in faults
        ]
    if isinstance(error, UnavailableError) and error.building is not None:
        problem["building"] = error.building
    return JSONResponse(problem, status_code=error.status, headers=error.headers, media_type=MEDIA_TYPE)
