"""Taking a request in, cheapest checks first, and noticing when its client leaves."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.requests import Request
from starlette.types import Receive

from server.edge import SMALL_BODY
from server.errors import ClientGoneError, MediaTypeError
from server.schemas import parse
from server.service import Service

T = TypeVar("T")
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


async def read_json(request: Request, model: type[Body], service: Service) -> Body:
    """The body as `model`. A request that the queue has no room for is refused before its body is read.

    Raises MediaTypeError (415), QueueFullError (429), UnavailableError (503), InvalidError (422).
    """
    check_media_type(request, "application/json")
    service.batcher.check_open()
    with service.uploads.one(request):
        body = await whole_body(request)
        if len(body) <= SMALL_BODY:
            return parse(model, body)
        return await service.codec.run(parse, model, body)


async def whole_body(request: Request) -> bytes:
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


async def until_gone(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """The result of `work`, cancelled when the client leaves (ClientGoneError). The body must have been read."""
    asking = asyncio.current_task()
    assert asking is not None
    leaving = asyncio.create_task(_cancel_when_gone(asking, receive))
    try:
        return await work
    except asyncio.CancelledError:
        if leaving.done() and not asking.uncancel():  # by nobody else
            raise ClientGoneError("the client left before its answer") from None
        raise
    finally:
        leaving.cancel()


async def _cancel_when_gone(asking: asyncio.Task[Any], receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    asking.cancel()
