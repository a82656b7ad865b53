"""Reading the body of a request, cheapest checks first."""

from typing import Any, TypeVar

from pydantic import BaseModel, RootModel
from starlette.requests import Request

from server.errors import ClientGoneError, MediaTypeError
from server.http.state import AppState
from server.http.upload_limit import SMALL_BODY
from server.http.validation import parse

Body = TypeVar("Body", bound=BaseModel)


def media_type_of(request: Request) -> str:
    """What the body is declared as, without parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def check_media_type(request: Request, wanted: str) -> None:
    """Raises MediaTypeError (415) unless the body is declared as `wanted`, and not compressed."""
    declared = request.headers.get("content-type", "")
    if media_type_of(request) != wanted:
        raise MediaTypeError(f"Content-Type: got {declared or 'none'}, allowed: {wanted}")
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise MediaTypeError(f"Content-Encoding: got {encoding}, allowed: none")


async def read_json(request: Request, model: type[Body], service: AppState) -> Body:
    """The body as `model`. A request that the queue has no room for is refused before its body is read.

    Raises MediaTypeError (415), QueueFullError (429), UnavailableError (503), InvalidError (422).
    """
    check_media_type(request, "application/json")
    service.scheduler.check_open()
    with service.uploads.one(request):
        body = await read_body(request)
        if len(body) <= SMALL_BODY:
            return parse(model, body)
        return await service.codec.run(parse, model, body)


async def read_object(request: Request, service: AppState) -> dict[str, Any]:
    """The body as a JSON object of any names. Raises as `read_json`."""
    return (await read_json(request, AnyObject, service)).root


class AnyObject(RootModel[dict[str, Any]]):
    """A JSON object."""


async def read_body(request: Request) -> bytes:
    """Raises ClientGoneError where the client leaves before the end."""
    parts = []
    more = True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError("the client left before its body was complete")
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return parts[0] if len(parts) == 1 else b"".join(parts)
