"""Cancels the work of a request when its client disconnects."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from server.errors import ClientGoneError

T = TypeVar("T")


async def cancel_on_disconnect(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """Returns the result of `work`.

    Cancels `work` and raises ClientGoneError when the client disconnects. Needs a body that was read to its end.
    """
    task = asyncio.current_task()
    assert task is not None
    watcher = asyncio.create_task(_cancel_on_disconnect(task, receive))
    try:
        return await work
    except asyncio.CancelledError:
        if watcher.done() and not task.uncancel():  # cancelled by the watcher alone
            raise ClientGoneError("the client left before its answer") from None
        raise
    finally:
        watcher.cancel()


async def _cancel_on_disconnect(task: asyncio.Task[Any], receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    task.cancel()
