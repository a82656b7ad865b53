"""Noticing that a client leaves while its answer is made."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from server.errors import ClientGoneError

T = TypeVar("T")


async def cancel_on_disconnect(work: Coroutine[Any, Any, T], receive: Receive) -> T:
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
