"""One session of WS /v1/live: the client's newest drawing and settings, and the one image in progress.

Two tasks share a few fields on the event loop. One receives messages and keeps only the newest drawing and settings.
The other generates images one by one. While its job waits in the queue, each newer drawing replaces it at its position,
so that an image shows the drawing that was newest when its batch began. Memory use does not grow with the messages that
a client sends or the images that it does not read.
"""

import asyncio
import secrets
import time
from collections.abc import Awaitable
from dataclasses import dataclass

from starlette.websockets import WebSocket, WebSocketDisconnect

from engines.types import Conditioning, Job, Pixels
from server.errors import (
    CLOSE_BUSY,
    CLOSE_ENGINE,
    CLOSE_GONE,
    CLOSE_IDLE,
    CLOSE_RESTART,
    CLOSE_SLOW,
    FieldError,
    InvalidError,
    QueueFullError,
    RequestError,
    SessionEndError,
    UnavailableError,
)
from server.generation.delivery import EncodedResult
from server.generation.generator import RANDOM_SEEDS, GenerationRequest, Generator, first_job, timings_of
from server.generation.model_engines import chosen_model, engines_by_name
from server.generation.scheduler import Scheduler
from server.live.messages import MAX_DRAWING, MAX_SETTINGS, LiveSettings, error_message, message
from server.telemetry.metrics import Metrics
from server.telemetry.timings import milliseconds

BUSY_S = 0.25  # after a full queue, until the next attempt
REST_S = 0.15  # without a message: the pen rests; a page that draws sends one every 0.03 s
SEND_S = 30.0  # a client that does not accept an image within this time is too slow for live drawing


@dataclass(frozen=True, slots=True)
class DrawRequest:
    """The image that the client wants: all its messages up to `sequence`, `drawings` of which were drawings."""

    job: Job
    request: GenerationRequest
    sequence: int
    drawings: int
    received: float  # time.monotonic() of the last of these messages
    repeats: bool  # the image that was sent by the fast decoder, now by the full one


class LiveSession:
    """One connection's session. `images_sent` counts its images."""

    def __init__(
        self,
        socket: WebSocket,
        scheduler: Scheduler,
        generator: Generator,
        metrics: Metrics,
        *,
        timeout_ms: int,
        idle_s: float,
    ) -> None:
        self._socket = socket
        self._scheduler = scheduler
        self._generator = generator
        self._allowed_prompt = ""  # the last prompt that passed the check
        self._metrics = metrics
        self._timeout_s = timeout_ms / 1000
        self._idle_s = idle_s
        self._seed = secrets.randbelow(RANDOM_SEEDS)  # fixed, so that an image changes only with its drawing
        self._sending = asyncio.Lock()
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._changed = asyncio.Event()
        self._settings = LiveSettings.model_validate({})
        self._drawing = b""
        self._sequence = 0  # of the newest message
        self._applied = 0  # of the newest valid message
        self._received = 0.0
        self._drawings = 0
        self._shown_drawings = 0
        self._decoded: tuple[bytes | str, int, Pixels] | None = None  # file, background, pixels
        self._reported_busy = False
        self._unfinished = False  # the client has a fast image, of which it gets the full one when the pen rests
        self.images_sent = 0

    def end(self, error: SessionEndError) -> None:
        """Ends the session from outside."""
        if not self._ended.done():
            self._ended.set_exception(error)

    async def run(self) -> None:
        """Returns when the client leaves. Raises SessionEndError if the server ends the session."""
        await self._send(self._greeting())
        tasks: list[asyncio.Future[None]] = [
            asyncio.create_task(self._receive(), name="live receive"),
            asyncio.create_task(self._draw(), name="live draw"),
            self._ended,
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        errors = [error for task in tasks if not task.cancelled() and (error := task.exception()) is not None]
        if errors:
            raise errors[0]

    def _greeting(self) -> str:
        engine = self._scheduler.engine
        limits = engine.limits
        width, height = limits.default_size
        return message(
            "ready",
            {
                "models": list(engines_by_name(engine)),
                "mode": "control" if "control" in limits.conditioning else "image",
                "conditioning": sorted(limits.conditioning),
                "width": width,
                "height": height,
                "steps": limits.steps,
                "decoders": limits.decoders,
                "seed": self._seed,
                "idle_s": self._idle_s,
                "max_drawing_bytes": MAX_DRAWING,
                "max_settings_characters": MAX_SETTINGS,
            },
        )

    # --- receiving ------------------------------------------------------------------------------------------------

    async def _receive(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self._idle_s):
                    received = await self._socket.receive()
            except TimeoutError as error:
                raise SessionEndError("idle", f"no message for {self._idle_s:g} s", CLOSE_IDLE) from error
            if received["type"] == "websocket.disconnect":
                return
            self._sequence += 1
            try:
                self._apply_message(received.get("text"), received.get("bytes"))
            except InvalidError as error:
                await self._send(error_message(error, self._sequence))

    def _apply_message(self, text: str | None, drawing: bytes | None) -> None:
        if text is not None:
            updated = self._settings.updated(text)
            self._check(updated)
            self._settings = updated
        elif drawing is not None:
            if len(drawing) > MAX_DRAWING:
                got = f"drawing: got {len(drawing)} bytes, allowed: at most {MAX_DRAWING} bytes (8 MiB)"
                raise InvalidError([FieldError("drawing", got)])
            self._drawing = drawing
            self._drawings += 1
        self._applied = self._sequence
        self._received = time.monotonic()
        self._changed.set()

    def _check(self, settings: LiveSettings) -> None:
        """Raises InvalidError for settings that no drawing could run with; the session then keeps its settings."""
        drawing = self._drawing or (b"" if settings.mode == "auto" else b"one to come")
        prompted = settings if settings.prompt else settings.model_copy(update={"prompt": "one to come"})
        try:
            first_job(self._request(prompted, drawing), self._scheduler.engine)
        except UnavailableError as error:
            raise _session_end(error) from error

    # --- drawing --------------------------------------------------------------------------------------------------

    async def _draw(self) -> None:
        while True:
            rests = await self._wait()
            latest = await self._latest_request(rests=rests)
            self._unfinished = False
            if latest is None:
                continue
            try:
                await self._generate(latest)
                self._reported_busy = False
            except QueueFullError as error:
                if not self._reported_busy:
                    await self._send(error_message(error, latest.sequence))
                self._reported_busy = True
                await asyncio.sleep(BUSY_S)
                if latest.repeats:
                    self._unfinished = True
                else:
                    self._changed.set()
            except UnavailableError as error:
                raise _session_end(error) from error
            except RequestError as error:
                await self._send(error_message(error, latest.sequence))

    async def _wait(self) -> bool:
        """Waits for the next image to make. Returns whether the pen rests and the image is that of the last one."""
        if not self._unfinished:
            await self._changed.wait()
            return False
        try:
            async with asyncio.timeout(REST_S):
                await self._changed.wait()
        except TimeoutError:
            return not self._changed.is_set()
        return False

    async def _latest_request(self, *, rests: bool = False) -> DrawRequest | None:
        """Returns the client's latest request; None without a prompt, or after it sent the client an error."""
        self._changed.clear()
        settings, drawing, sequence = self._settings, self._drawing, self._applied
        drawings, received = self._drawings, self._received
        if not settings.prompt:
            return None
        try:
            request = self._request(settings, drawing, rests=rests)
            job = first_job(request, self._scheduler.engine)
            if settings.prompt != self._allowed_prompt:
                await self._generator.check_prompt(settings.prompt)
                self._allowed_prompt = settings.prompt
            job = await self._generator.with_images(job, request, self._decode)
        except UnavailableError as error:
            raise _session_end(error) from error
        except RequestError as error:
            await self._send(error_message(error, sequence))
            return None
        return DrawRequest(job, request, sequence, drawings, received, repeats=rests)

    def _request(self, settings: LiveSettings, drawing: bytes, *, rests: bool = False) -> GenerationRequest:
        conditioning, decoder = self._conditioning(settings, drawing), settings.decoder
        if decoder == "auto":
            decoder = "full" if rests else self._scheduler.engine.limits.decoders[-1]
        return settings.generation_request(
            decoder=decoder,
            seed=self._seed if settings.seed is None else settings.seed,
            image=drawing if conditioning == "image" else None,
            control_image=drawing if conditioning == "control" else None,
        )

    def _conditioning(self, settings: LiveSettings, drawing: bytes) -> Conditioning:
        if not drawing:
            return "text"
        if settings.mode == "auto":
            _, engine = chosen_model(self._scheduler.engine, settings.model)
            return "control" if "control" in engine.limits.conditioning else "image"
        return settings.mode

    async def _decode(self, _: str, drawing: bytes | str, background: int) -> Pixels:
        """Decodes a drawing once, however often it is used again with other settings."""
        if self._decoded is None or self._decoded[0] is not drawing or self._decoded[1] != background:
            self._decoded = (drawing, background, await self._generator.decode("drawing", drawing, background))
        return self._decoded[2]

    async def _generate(self, latest: DrawRequest) -> None:
        """Generates and sends one image: of `latest`, or of the request that is newest when its batch begins."""
        with self._scheduler.reserve(1, time.monotonic() + self._timeout_s) as slots:
            (future,) = slots.submit([latest.job], self._generator.encoder(latest.request, []))
            while not future.done():
                if not self._changed.is_set():
                    await _either(future, self._changed.wait())
                elif (newer := await self._latest_request()) is not None:
                    if slots.replace(newer.job, self._generator.encoder(newer.request, [])):
                        latest = newer
                        continue
                    await asyncio.wait((future,))
                    self._changed.set()
            result = await future
        await self._send_image(latest, result)

    async def _send_image(self, shown: DrawRequest, result: EncodedResult) -> None:
        timings = timings_of([result], shown.received)
        superseded = max(shown.drawings - self._shown_drawings - 1, 0)
        header = {
            "sequence": shown.sequence,
            "dropped": superseded,
            "mode": shown.job.conditioning,
            "decoder": shown.job.decoder,
            "seed": shown.job.seed,
            "width": shown.job.width,
            "height": shown.job.height,
            "format": shown.request.output_format,
            "bytes": len(result.content),
            "prompt_truncated": result.image.prompt_truncated,
            "timings_ms": milliseconds(timings),
        }
        await self._send(message("picture", header), result.content)
        self._shown_drawings = shown.drawings
        self.images_sent += 1
        self._unfinished = shown.job.decoder == "fast" and self._settings.decoder == "auto"
        if not shown.repeats:
            self._metrics.live_seconds.observe(timings.total / 1000)
        self._metrics.live_superseded.inc(superseded)

    async def _send(self, text: str, content: bytes | None = None) -> None:
        """Sends a text message, then a binary one. Raises SessionEndError for a client that does not read."""
        try:
            async with asyncio.timeout(SEND_S), self._sending:
                await self._socket.send_text(text)
                if content is not None:
                    await self._socket.send_bytes(content)
        except TimeoutError as error:
            raise SessionEndError("slow", f"nothing was read for {SEND_S:g} s", CLOSE_SLOW) from error
        except RuntimeError as error:  # uvicorn's, once it has closed on a client that broke the protocol
            raise WebSocketDisconnect(CLOSE_GONE) from error


def _session_end(error: UnavailableError) -> SessionEndError:
    close_codes = {"not_ready": CLOSE_BUSY, "draining": CLOSE_RESTART}
    return SessionEndError(error.code, error.detail, close_codes.get(error.code, CLOSE_ENGINE))


async def _either(future: asyncio.Future[EncodedResult], other: Awaitable[object]) -> None:
    """Returns when one of the two is done, and cancels `other`."""
    waiting = asyncio.ensure_future(other)
    try:
        await asyncio.wait((future, waiting), return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
