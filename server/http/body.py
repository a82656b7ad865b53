"""Reads the body of a request; the cheapest checks come first."""

from typing import Any, TypeVar

from pydantic import BaseModel, RootModel
from starlette.requests import Request

from server.errors import ClientGoneError, MediaTypeError
from server.http.state import AppState
from server.http.upload_limit import SMALL_BODY
from server.http.validation import parse

Body = TypeVar("Body", bound=BaseModel)


def media_type_of(request: Request) -> str:
    """Returns the media type of Content-Type, in lower case and without parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def check_media_type(request: Request, expected: str) -> None:
    """Raises MediaTypeError (415) unless Content-Type is `expected` and the body is not compressed."""
    declared = request.headers.get("content-type", "")
    if media_type_of(request) != expected:
        raise MediaTypeError(f"Content-Type: got {declared or 'none'}, allowed: {expected}")
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise MediaTypeError(f"Content-Encoding: got {encoding}, allowed: none")


async def read_json(request: Request, model: type[Body], state: AppState) -> Body:
    """Returns the body as `model`. Checks the queue for room before it reads the body.

    Raises MediaTypeError (415), QueueFullError (429), UnavailableError (503), InvalidError (422).
    """
    check_media_type(request, "application/json")
    state.scheduler.check_open()
    with state.upload_limit.hold(request):
        body = await read_body(request)
        if len(body) <= SMALL_BODY:
            return parse(model, body)
        return await state.codec.run(parse, model, body)


async def read_json_object(request: Request, state: AppState) -> dict[str, Any]:
    """Returns the body as a JSON object with any fields. Raises the errors of `read_json`."""
    return (await read_json(request, JsonObject, state)).root


class JsonObject(RootModel[dict[str, Any]]):
    """A JSON object."""


async def read_body(request: Request) -> bytes:
    """Returns the whole body. Raises ClientGoneError when the client disconnects before its end."""
    parts = []
    more = True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError("the client left before its body was complete")
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return parts[0] if len(parts) == 1 else b"".join(parts)
