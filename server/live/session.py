"""One session of WS /v1/live: what its client sent last, and the one picture of it that is being made.

Two tasks share a few fields on the event loop. One listens and keeps only the newest drawing and settings. The other
makes pictures one after the other: while its job waits in the queue it is made to show what is newest, in its place, so
a drawing is at most as old as the batch that runs. Nothing here grows with what a client sends or does not read.
"""

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from starlette.websockets import WebSocket, WebSocketDisconnect

from engines.types import Conditioning, Job, Pixels, RawImage
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
from server.generation.generator import BLACK, RANDOM_SEEDS, WHITE, GenerationRequest, first_job
from server.generation.image_codec import Codec, encoder
from server.generation.safety.guard import Safety
from server.generation.scheduler import Scheduler
from server.live.messages import MAX_DRAWING, MAX_SETTINGS, LiveSettings, error_message, message
from server.telemetry.metrics import Metrics

BUSY_S = 0.25  # after the queue was full, until the next attempt
SEND_S = 30.0  # a client that does not take a picture for so long is too slow for live drawing


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the client wants to see: everything up to its message `sequence`, which came at `received`."""

    job: Job
    settings: LiveSettings
    sequence: int
    drawings: int
    received: float  # time.monotonic()


class LiveSession:
    """`drawn` counts the pictures that were sent."""

    def __init__(
        self,
        socket: WebSocket,
        scheduler: Scheduler,
        codec: Codec,
        safety: Safety,
        metrics: Metrics,
        *,
        timeout_ms: int,
        idle_s: float,
    ) -> None:
        self._socket = socket
        self._scheduler = scheduler
        self._codec = codec
        self._safety = safety
        self._allowed = ""  # the prompt that was checked last, and may be drawn
        self._metrics = metrics
        self._timeout_s = timeout_ms / 1000
        self._idle_s = idle_s
        self._seed = secrets.randbelow(RANDOM_SEEDS)  # one for the session: a picture must not change by itself
        self._sending = asyncio.Lock()
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._news = asyncio.Event()
        self._settings = LiveSettings.model_validate({})
        self._drawing = b""
        self._sequence = 0  # of the newest message, and of the newest that was understood
        self._understood = 0
        self._received = 0.0
        self._drawings = 0
        self._shown_drawings = 0
        self._decoded: tuple[bytes, int, Pixels] | None = None  # file, background, pixels
        self._said_busy = False
        self.drawn = 0

    def end(self, error: SessionEndError) -> None:
        """Ends the session from outside."""
        if not self._ended.done():
            self._ended.set_exception(error)

    async def run(self) -> None:
        """Returns when the client leaves. Raises SessionEndError where the server ends the session."""
        await self._say(self._greeting())
        tasks: list[asyncio.Future[None]] = [
            asyncio.create_task(self._listen(), name="live listen"),
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
        limits = self._scheduler.engine.limits
        width, height = limits.default_size
        return message(
            "ready",
            {
                "mode": "control" if "control" in limits.conditioning else "image",
                "conditioning": sorted(limits.conditioning),
                "width": width,
                "height": height,
                "steps": limits.steps,
                "seed": self._seed,
                "idle_s": self._idle_s,
                "max_drawing_bytes": MAX_DRAWING,
                "max_settings_characters": MAX_SETTINGS,
            },
        )

    # --- listening ------------------------------------------------------------------------------------------------

    async def _listen(self) -> None:
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
                self._understand(received.get("text"), received.get("bytes"))
            except InvalidError as error:
                await self._say(error_message(error, self._sequence))

    def _understand(self, text: str | None, drawing: bytes | None) -> None:
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
        self._understood = self._sequence
        self._received = time.monotonic()
        self._news.set()

    def _check(self, settings: LiveSettings) -> None:
        """Raises InvalidError for settings that no drawing could be made with: the session keeps those it had."""
        try:
            limits = self._scheduler.engine.limits
        except UnavailableError as error:
            raise _unavailable(error) from error
        drawing = self._drawing or (b"" if settings.mode == "auto" else b"one to come")
        prompted = settings if settings.prompt else settings.model_copy(update={"prompt": "one to come"})
        first_job(_order(prompted, drawing, self._conditioning(settings, drawing), self._seed), limits)

    # --- drawing --------------------------------------------------------------------------------------------------

    async def _draw(self) -> None:
        while True:
            await self._news.wait()
            wanted = await self._newest()
            if wanted is None:
                continue
            try:
                await self._picture(wanted)
                self._said_busy = False
            except QueueFullError as error:
                if not self._said_busy:
                    await self._say(error_message(error, wanted.sequence))
                self._said_busy = True
                await asyncio.sleep(BUSY_S)
                self._news.set()
            except UnavailableError as error:
                raise _unavailable(error) from error
            except RequestError as error:
                await self._say(error_message(error, wanted.sequence))

    async def _newest(self) -> Wanted | None:
        """What the client wants now; None where it has no prompt yet, or wants what cannot be (and is told so)."""
        self._news.clear()
        settings, drawing, sequence = self._settings, self._drawing, self._understood
        wanted = (settings, sequence, self._drawings, self._received)
        if not settings.prompt:
            return None
        try:
            kind = self._conditioning(settings, drawing)
            job = first_job(_order(settings, drawing, kind, self._seed), self._scheduler.engine.limits)
            if self._safety.checks_prompts and settings.prompt != self._allowed:
                await self._codec.run(self._safety.check_prompt, settings.prompt)
                self._allowed = settings.prompt
            if kind == "image":
                job = replace(job, image=await self._pixels(drawing, WHITE))
            elif kind == "control":
                job = replace(job, control_image=await self._pixels(drawing, BLACK))
        except UnavailableError as error:
            raise _unavailable(error) from error
        except RequestError as error:
            await self._say(error_message(error, sequence))
            return None
        return Wanted(job, *wanted)

    def _conditioning(self, settings: LiveSettings, drawing: bytes) -> Conditioning:
        if not drawing:
            return "text"
        if settings.mode == "auto":
            return "control" if "control" in self._scheduler.engine.limits.conditioning else "image"
        return settings.mode

    async def _pixels(self, drawing: bytes, background: int) -> Pixels:
        """The drawing, decoded once however often it is drawn again with other settings."""
        if self._decoded is None or self._decoded[0] is not drawing or self._decoded[1] != background:
            self._decoded = (drawing, background, await self._codec.decode("drawing", drawing, background))
        return self._decoded[2]

    async def _picture(self, wanted: Wanted) -> None:
        """Makes and sends one picture, of `wanted` or of what is newer when its batch begins."""
        with self._scheduler.reserve(1, time.monotonic() + self._timeout_s) as slots:
            (future,) = slots.submit([wanted.job], self._encoder(wanted))
            while not future.done():
                if not self._news.is_set():
                    await _either(future, self._news.wait())
                elif (newer := await self._newest()) is not None:
                    if slots.replace(newer.job, self._encoder(newer)):
                        wanted = newer
                        continue
                    await asyncio.wait((future,))
                    self._news.set()
            made = await future
        await self._show(wanted, made)

    def _encoder(self, wanted: Wanted) -> Callable[[RawImage], bytes]:
        settings = wanted.settings
        return self._safety.guarded(encoder(settings.output_format, settings.output_quality, base64=False), [])

    async def _show(self, wanted: Wanted, made: EncodedResult) -> None:
        total_s = time.monotonic() - wanted.received
        dropped = max(wanted.drawings - self._shown_drawings - 1, 0)
        finished, stages = made.finished, made.finished.image.stages
        timings = {
            "queue": finished.queue_s,
            "text": stages.text,
            "denoise": stages.denoise,
            "decode": stages.decode,
            "encode": made.encode_s,
            "total": total_s,
        }
        header = {
            "sequence": wanted.sequence,
            "dropped": dropped,
            "mode": wanted.job.conditioning,
            "seed": wanted.job.seed,
            "width": wanted.job.width,
            "height": wanted.job.height,
            "format": wanted.settings.output_format,
            "bytes": len(made.content),
            "prompt_truncated": finished.image.prompt_truncated,
            "timings_ms": {stage: round(1000 * seconds, 3) for stage, seconds in timings.items()},
        }
        await self._say(message("picture", header), made.content)
        self._shown_drawings = wanted.drawings
        self.drawn += 1
        self._metrics.live_seconds.observe(total_s)
        self._metrics.live_superseded.inc(dropped)

    async def _say(self, text: str, content: bytes | None = None) -> None:
        """Sends a text message, and a binary one right behind it. Raises SessionEndError for a client that is stuck."""
        try:
            async with asyncio.timeout(SEND_S), self._sending:
                await self._socket.send_text(text)
                if content is not None:
                    await self._socket.send_bytes(content)
        except TimeoutError as error:
            raise SessionEndError("slow", f"nothing was read for {SEND_S:g} s", CLOSE_SLOW) from error
        except RuntimeError as error:  # uvicorn's, once it has closed on a client that broke the protocol
            raise WebSocketDisconnect(CLOSE_GONE) from error


def _order(settings: LiveSettings, drawing: bytes, kind: Conditioning, seed: int) -> GenerationRequest:
    return GenerationRequest(
        prompt=settings.prompt,
        steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        seed=seed if settings.seed is None else settings.seed,
        width=settings.width,
        height=settings.height,
        image=drawing if kind == "image" else None,
        strength=settings.strength,
        control_image=drawing if kind == "control" else None,
        control_scale=settings.control_scale,
        lora=settings.adapters,
    )


def _unavailable(error: UnavailableError) -> SessionEndError:
    close_codes = {"not_ready": CLOSE_BUSY, "draining": CLOSE_RESTART}
    return SessionEndError(error.code, error.detail, close_codes.get(error.code, CLOSE_ENGINE))


async def _either(future: asyncio.Future[EncodedResult], other: Awaitable[object]) -> None:
    """Returns when one of the two is done; the second is given up then."""
    waiting = asyncio.ensure_future(other)
    try:
        await asyncio.wait((future, waiting), return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
