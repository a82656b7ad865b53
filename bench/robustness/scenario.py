"""A fault's surroundings: a supervised server, clients that know the correct image, and recovery times.

Outcome labels: `200` (the correct image), `200 wrong image`, a status with its code, `refused` (no connection), `cut`
(the connection ended without a response), `silence` (nothing within REQUEST_TIMEOUT_S).
"""

import asyncio
import base64
import io
import json
import random
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image

from bench.harness.errors import BenchError
from bench.harness.http_client import HttpResponse
from bench.robustness.restarting_server import RestartingServer
from engines.fake import expected_pixels
from engines.types import DecoderName, Job

OK = "200"
REQUEST_TIMEOUT_S = 60.0  # beyond this an answer is lost
RETRY_PAUSE_S = 0.1  # between a failed attempt and the next
DEFAULT_SIZE = (256, 256)  # of the fake engine
DECODERS: tuple[DecoderName, ...] = ("full", "fast")
SUBJECTS = ("circle", "square", "triangle", "star", "moon")


@dataclass
class Scenario:
    """State of one fault. `count`: how often to inject it. `fault_time`: the last injection, time.monotonic()."""

    server: RestartingServer
    rng: random.Random
    count: int
    background_count: int = 0
    fault_time: float = 0.0
    recovery_s: list[float] = field(default_factory=list)  # seconds from a fault to the next correct image
    never_ok: int = 0  # requests that never got an image despite retries
    varied: bool = False  # the server has two decoders, the adapter ring and AUTOMATIC1111's API: requests use them

    def new_job(self, marker: str = "", size: int = 64) -> Job:
        subject = self.rng.choice(SUBJECTS)
        job = Job(f"{subject} {self.rng.randrange(10**9)} {marker}".strip(), self.rng.randrange(2**31), size, size)
        return self.vary(job, self.rng)

    def vary(self, job: Job, rng: random.Random) -> Job:
        """Returns the job with a decoder and an adapter or none, where the server has them."""
        if not self.varied:
            return job
        lora: tuple[tuple[str, float], ...] = rng.choice(((), (), (("ring", 0.5),)))
        return replace(job, decoder=rng.choice(DECODERS), lora=lora)

    async def ask(self, job: Job, **fields: object) -> str:
        """Requests the image once and returns the outcome label; every third by AUTOMATIC1111's API if `varied`."""
        sdapi = self.varied and not fields and not job.lora and job.seed % 3 == 0
        path, body = "/sdapi/v1/txt2img" if sdapi else "/generate", request_fields(job, by_ratio=not sdapi) | fields
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                response = await self.server.exchange("POST", path, json.dumps(body).encode())
        except TimeoutError:
            return "silence"
        except ConnectionRefusedError:
            return "refused"
        except (OSError, EOFError, BenchError):
            return "cut"
        return outcome_label(response, job)

    async def request_until_ok(self, job: Job, outcomes: Counter[str]) -> None:
        """Requests the image until it arrives."""
        end = time.monotonic() + REQUEST_TIMEOUT_S
        while time.monotonic() < end:
            label = await self.ask(job)
            outcomes[label] += 1
            if label == OK:
                return
            await asyncio.sleep(RETRY_PAUSE_S)
        self.never_ok += 1

    async def background_clients(self, clients: int, stop: asyncio.Event) -> Counter[str]:
        """Runs clients that request one image after the other until `stop`."""
        outcomes: Counter[str] = Counter()
        self.background_count = clients

        async def client(rng: random.Random) -> None:
            while not stop.is_set():
                job = Job(f"bystander {rng.random()}", rng.randrange(2**31), 64, 64)
                await self.request_until_ok(self.vary(job, rng), outcomes)

        await asyncio.gather(*(client(random.Random(self.rng.random())) for _ in range(clients)))
        return outcomes

    async def request_all(self, jobs: Iterable[Job]) -> Counter[str]:
        return Counter(await asyncio.gather(*(self.ask(job) for job in jobs)))

    def mark_fault(self) -> None:
        self.fault_time = time.monotonic()

    async def wait_recovery(self) -> None:
        """Waits for the next correct image, and records the seconds since the fault."""
        await self.request_until_ok(self.new_job(), Counter())
        self.recovery_s.append(time.monotonic() - self.fault_time)

    def slow_jobs(self, batches: int) -> list[Job]:
        """Returns jobs of half a second each; their sizes differ, so they are not batched."""
        return [self.new_job("[[slow]]", 96 + 32 * i) for i in range(batches)]

    async def wait_accepted(self, tasks: Sequence[asyncio.Task[str]]) -> None:
        """Waits until the server has accepted these requests: they and those of all background clients are queued,
        running or done."""
        end = time.monotonic() + REQUEST_TIMEOUT_S
        while True:
            stop = sum(task.done() for task in tasks)  # read before the metrics, so that no request counts twice
            samples = await self.server.metrics()
            in_flight = samples["sana_sprint_jobs_waiting"] + samples["sana_sprint_jobs_running"]
            if stop == len(tasks) or in_flight + stop >= len(tasks) + self.background_count:
                return
            if time.monotonic() > end:
                raise BenchError(f"{len(tasks)} orders were never inside at the same time")
            await asyncio.sleep(0.005)


def request_fields(job: Job, *, by_ratio: bool = True) -> dict[str, object]:
    """Returns the fields of POST /generate. by_ratio: the fake engine's default size is asked for as 1:1."""
    size: dict[str, object] = {"width": job.width, "height": job.height}
    if by_ratio and (job.width, job.height) == DEFAULT_SIZE:
        size = {"aspect_ratio": "1:1"}
    chosen: dict[str, object] = {"lora": dict(job.lora)} if job.lora else {}
    chosen |= {} if job.decoder == "full" else {"decoder": job.decoder}
    return {"prompt": job.prompt, "seed": job.seed, **size, **chosen}


def outcome_label(response: HttpResponse, job: Job) -> str:
    if response.status == 200:
        body = response.body
        if body.startswith(b"{"):  # AUTOMATIC1111's
            body = base64.b64decode(json.loads(body)["images"][0])
        with Image.open(io.BytesIO(body)) as image:
            correct = np.array_equal(np.asarray(image.convert("RGB")), expected_pixels(job))
        return OK if correct else "200 wrong image"
    return f"{response.status} {json.loads(response.body).get('code', '')}".strip()
