"""From the engine's thread to the event loop, a picture by way of the codec's threads.

The engine's thread hands a picture over and goes on with its next batch: it waits neither for an encoder nor for the
event loop, and the event loop hears of a picture once, when its file is there.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from engines.types import Engine
from server.errors import RequestError
from server.generation.engine_thread import Finished, Outcome
from server.generation.image_codec import Codec
from server.generation.job_queue import QueuedJob

logger = logging.getLogger("server.generation")


@dataclass(frozen=True, slots=True)
class EncodedResult:
    """A job's file, and the seconds from its pixels to there, the wait for a codec thread included.

    `content` is empty where nobody waited for it any more.
    """

    finished: Finished
    content: bytes
    encode_s: float


class ResultSink(Protocol):
    """Who hears of it, always on the event loop."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None: ...

    def on_ready(self, engine: Engine) -> None: ...

    def on_results(self, outcomes: Sequence[tuple[QueuedJob, EncodedResult | Exception]]) -> None: ...

    def on_expired(self, entries: Sequence[QueuedJob]) -> None: ...

    def failed(self, exit_code: int, reason: str) -> None: ...


class ResultDelivery:
    """The Listener of an EngineThread."""

    def __init__(self, sink: ResultSink, codec: Codec) -> None:
        self._sink = sink
        self._codec = codec

    def on_ready(self, engine: Engine) -> None:
        self._post(self._sink.on_ready, engine)

    def on_outcomes(self, outcomes: Sequence[tuple[QueuedJob, Outcome]]) -> None:
        refused = [(entry, outcome) for entry, outcome in outcomes if isinstance(outcome, RequestError)]
        if refused:
            self._post(self._sink.on_results, refused)
        for entry, outcome in outcomes:
            if isinstance(outcome, Finished):
                entry.has_pixels = True
                try:
                    self._codec.begin(self._encode, entry, outcome, time.monotonic())
                except RuntimeError:  # of a pool that is closed
                    logger.error("the codec ended before the engine's thread; a picture is lost")

    def on_expired(self, entries: Sequence[QueuedJob]) -> None:
        self._post(self._sink.on_expired, entries)

    def on_engine_lost(self, exit_code: int, reason: str) -> None:
        self._post(self._sink.failed, exit_code, reason)

    def _encode(self, entry: QueuedJob, finished: Finished, handed: float) -> None:
        """On a codec thread."""
        outcome: EncodedResult | Exception
        try:
            content = b"" if entry.future.done() else entry.encode(finished.image)
            outcome = EncodedResult(finished, content, time.monotonic() - handed)
        except Exception as error:  # told to the request
            outcome = error
        self._post(self._sink.on_results, [(entry, outcome)])

    def _post(self, call: Callable[..., None], *arguments: object) -> None:
        loop = self._sink.loop
        if loop is None or loop.is_closed():
            logger.error("the event loop ended before the engine's thread; %s is lost", call.__name__)
        else:
            loop.call_soon_threadsafe(call, *arguments)
