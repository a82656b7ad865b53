"""Sends image requests in a closed or open loop and records each outcome.

Closed loop: each client waits for its response before it sends the next request. Open loop: requests leave at Poisson
times of a fixed rate. Latency counts from the planned time, so a stalled server cannot hide it (no coordinated
omission). Bodies are spooled to a file for checks after the run.
"""

import asyncio
import json
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from bench.harness.errors import BenchError
from bench.harness.http_client import ConnectionPool, HttpResponse
from bench.harness.summary import STAGES

FORMATS = ("png", "jpeg", "webp")  # the API's names of image formats


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """A request for one image. width and height None: the server's default size."""

    prompt: str
    seed: int
    steps: int
    output_format: str
    width: int | None = None
    height: int | None = None
    timeout_ms: int | None = None

    def body(self) -> bytes:
        fields: dict[str, object] = {
            "prompt": self.prompt,
            "seed": self.seed,
            "num_inference_steps": self.steps,
            "output_format": self.output_format,
            "width": self.width,
            "height": self.height,
            "timeout_ms": self.timeout_ms,
        }
        return json.dumps({name: value for name, value in fields.items() if value is not None}).encode()


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """The outcome of a request, in seconds. status 0: no response; `error` has the reason."""

    request: ImageRequest
    status: int
    seconds: float  # from the planned time to the last byte
    send_delay_s: float  # how long after the planned time it was sent: the generator's own delay
    stages_ms: dict[str, float]  # Server-Timing
    spool_range: tuple[int, int]  # offset and length of the body in the spool
    error: str = ""

    @property
    def engine_ms(self) -> float:
        """The engine's share of the response time; the rest is the server and the queue."""
        return sum(self.stages_ms.get(stage, 0.0) for stage in STAGES)


class LoadGenerator:
    """Sends requests to one server. `timeout_s`: a slower response counts as none."""

    def __init__(self, url: str, spool: BinaryIO, *, timeout_s: float = 120.0) -> None:
        self._pool = ConnectionPool(url)
        self._spool, self._timeout_s = spool, timeout_s

    async def closed_loop(self, requests: Iterable[ImageRequest], concurrency: int) -> list[RequestRecord]:
        """Sends all requests, `concurrency` at a time; returns records in order of completion."""
        waiting = iter(requests)
        records: list[RequestRecord] = []

        async def client() -> None:
            for request in waiting:
                records.append(await self._send(request, time.perf_counter()))

        await asyncio.gather(*(client() for _ in range(concurrency)))
        return records

    async def open_loop(self, requests: Sequence[ImageRequest], rate: float, seed: int = 0) -> list[RequestRecord]:
        """Sends all requests at random times, `rate` a second on average. A seed fixes the times."""
        rng = random.Random(seed)
        began = due = time.perf_counter()
        sent: list[asyncio.Task[RequestRecord]] = []
        for request in requests:
            due += rng.expovariate(rate)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            sent.append(asyncio.create_task(self._send(request, due)))
        if not sent:
            raise BenchError(f"open loop: no orders to send since {began:.0f} at {rate:g} a second")
        return list(await asyncio.gather(*sent))

    async def get(self, path: str) -> HttpResponse:
        """Returns the response to a GET. Raises BenchError unless the status is 200."""
        response = await asyncio.wait_for(self._pool.exchange("GET", path), self._timeout_s)
        if response.status != 200:
            raise BenchError(f"GET {path}: got {response.status}: {response.body[:200]!r}")
        return response

    async def close(self) -> None:
        await self._pool.close()

    async def _send(self, request: ImageRequest, due: float) -> RequestRecord:
        send_delay_s = time.perf_counter() - due
        try:
            async with asyncio.timeout(self._timeout_s):
                response = await self._pool.exchange("POST", "/generate", request.body())
        except (OSError, EOFError, TimeoutError, BenchError) as error:
            seconds = time.perf_counter() - due
            return RequestRecord(request, 0, seconds, send_delay_s, {}, (0, 0), f"{type(error).__name__}: {error}")
        seconds = time.perf_counter() - due
        spool_range = (self._spool.tell(), self._spool.write(response.body))
        return RequestRecord(
            request,
            response.status,
            seconds,
            send_delay_s,
            _parse_stages(response.headers.get("server-timing", "")),
            spool_range,
        )


def _parse_stages(header: str) -> dict[str, float]:
    """Returns milliseconds by stage from `queue;dur=0.1, text;dur=2`."""
    parts = (part.partition(";dur=") for part in header.split(","))
    return {name.strip(): float(value) for name, _, value in parts if value}
