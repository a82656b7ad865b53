"""Results from the engine's thread to their requests, by way of the codec threads.

A result takes two hops: a codec thread encodes the image, then the event loop sets the job's future. The engine's
thread waits for neither. The second hop is enough for a file that the engine made, and that is sent as it is, and for
a small PNG: fpng holds the interpreter lock, so that no thread spares the event loop these 0.2 ms.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engines.types import Engine, RawImage
from server.errors import RequestError
from server.generation.image_codec import Codec, ImageEncoder
from server.generation.job_queue import QueuedJob

logger = logging.getLogger("server.generation")


@dataclass(frozen=True, slots=True)
class EncodedResult:
    """One job's image and its file. `content` is empty if the request ended before the image was encoded."""

    image: RawImage
    content: bytes
    queue_s: float  # from submission to the start of the batch
    encode_s: float  # from pixels to file, the wait for a codec thread included


class ResultDelivery:
    """Called on the engine's thread. Calls the callbacks on the event loop, once `loop` is set."""

    def __init__(
        self,
        codec: Codec,
        *,
        on_ready: Callable[[Engine], None],
        on_result: Callable[[QueuedJob, EncodedResult | Exception], None],
        on_expired: Callable[[Sequence[QueuedJob]], None],
        on_engine_lost: Callable[[int, str], None],
    ) -> None:
        self._codec = codec
        self._on_ready = on_ready
        self._on_result = on_result
        self._on_expired = on_expired
        self._on_engine_lost = on_engine_lost
        self.loop: asyncio.AbstractEventLoop | None = None

    def ready(self, engine: Engine) -> None:
        self._post(self._on_ready, engine)

    def image(self, job: QueuedJob, image: RawImage, queue_s: float) -> None:
        """Encodes the image, then delivers it. Returns at once."""
        job.has_pixels = True
        if isinstance(job.encode, ImageEncoder):
            if job.encode.takes_as_is(image):
                self._encode(job, image, queue_s, time.monotonic())
                return
            if job.encode.is_short(image):
                self._post(self._encode_on_loop, job, image, queue_s, time.monotonic())
                return
        try:
            self._codec.submit(self._encode, job, image, queue_s, time.monotonic())
        except RuntimeError:  # the pool is closed
            logger.error("the codec ended before the engine's thread; an image is lost")

    def error(self, job: QueuedJob, error: RequestError) -> None:
        self._post(self._on_result, job, error)

    def expired(self, jobs: Sequence[QueuedJob]) -> None:
        self._post(self._on_expired, jobs)

    def engine_lost(self, exit_code: int, reason: str) -> None:
        self._post(self._on_engine_lost, exit_code, reason)

    def _encode_on_loop(self, job: QueuedJob, image: RawImage, queue_s: float, since: float) -> None:
        self._on_result(job, self._encoded(job, image, queue_s, since))

    def _encode(self, job: QueuedJob, image: RawImage, queue_s: float, since: float) -> None:
        """Runs on a codec thread, or on the engine's where nothing is left to encode."""
        self._post(self._on_result, job, self._encoded(job, image, queue_s, since))

    def _encoded(self, job: QueuedJob, image: RawImage, queue_s: float, since: float) -> EncodedResult | Exception:
        try:
            content = b"" if job.future.done() else job.encode(image)
            return EncodedResult(image, content, queue_s, time.monotonic() - since)
        except Exception as error:  # becomes the job's result
            return error

    def _post(self, callback: Callable[..., None], *arguments: object) -> None:
        if self.loop is None or self.loop.is_closed():
            logger.error("the event loop ended before the engine's thread; %s is lost", callback.__name__)
        else:
            self.loop.call_soon_threadsafe(callback, *arguments)
