"""Clients of the HTTP routes: requests at random times, each repeated until its response is correct."""

import asyncio
import random
import time

from bench.harness.errors import BenchError
from bench.harness.http_client import ConnectionPool, HttpResponse
from bench.load.soak.counters import Counters
from bench.load.soak.requests import SoakRequest, random_request
from bench.robustness.scenario import REQUEST_TIMEOUT_S, RETRY_PAUSE_S

REFUSED = "429 queue_full"  # allowed during a burst of other clients


class HttpClients:
    """Open loop: `rate` requests a second on average, independent of the server."""

    def __init__(self, url: str, counters: Counters, start_time: float, seed: int) -> None:
        self._pool = ConnectionPool(url)
        self._counters, self._start_time = counters, start_time
        self._rng = random.Random(f"{seed} customers")

    async def run(self, rate: float, stop: asyncio.Event) -> None:
        """Sends requests until `stop`, and returns when all are answered."""
        due = time.monotonic()
        async with asyncio.TaskGroup() as group:
            while not stop.is_set():
                due += self._rng.expovariate(rate)
                pause = asyncio.create_task(stop.wait())
                await asyncio.wait((pause,), timeout=max(0.0, due - time.monotonic()))
                pause.cancel()
                group.create_task(self._request_until_ok(random_request(self._rng), due))
        await self._pool.close()

    async def _request_until_ok(self, request: SoakRequest, due: float) -> None:
        end = due + REQUEST_TIMEOUT_S
        label, expected = "", str(request.status)
        while time.monotonic() < end:
            response = await self._send(request)
            latency_s = time.monotonic() - due
            label = response if isinstance(response, str) else request.label(response)
            self._counters.count(request.kind, label, (expected, REFUSED))
            if label == expected:
                self._counters.add_latency(time.monotonic() - self._start_time, request.kind, latency_s)
                return
            await asyncio.sleep(RETRY_PAUSE_S)
            due = time.monotonic()  # a latency is that of one attempt
        self._counters.count(request.kind, f"never answered, at last {label}", ())

    async def _send(self, request: SoakRequest) -> HttpResponse | str:
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                return await self._pool.exchange(request.method, request.path, request.body, request.media_type)
        except TimeoutError:
            return "silence"
        except (OSError, EOFError, BenchError) as error:
            return f"cut: {type(error).__name__}"
