"""Where a fault plays: a supervised server, customers who know what they must get, and a clock for the recovery.

A customer's label says what it saw: `200` (the right picture), `200 wrong picture`, a status with its code, `refused`
(no connection), `cut` (a connection that ended without an answer) or `silence` (nothing within PATIENCE_S).
"""

import asyncio
import io
import json
import random
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from bench.harness.errors import BenchError
from bench.harness.http_client import Answer
from bench.robustness.restarting_server import Supervisor
from engines.fake import expected_pixels
from engines.types import Job

RIGHT = "200"
PATIENCE_S = 60.0  # beyond this an answer is lost
AGAIN_S = 0.1  # between an answer that is no picture and the next attempt
SUBJECTS = ("circle", "square", "triangle", "star", "moon")


@dataclass
class Stage:
    """`count` is how often the fault is to happen; `struck` is when it last did (time.monotonic())."""

    supervisor: Supervisor
    rng: random.Random
    count: int
    crowded: int = 0  # customers of the crowd
    struck: float = 0.0
    recovered: list[float] = field(default_factory=list)  # seconds from a strike to the next right picture
    never: int = 0  # orders that were asked again and again and never became a picture

    def order(self, marker: str = "", size: int = 64) -> Job:
        subject = self.rng.choice(SUBJECTS)
        return Job(f"{subject} {self.rng.randrange(10**9)} {marker}".strip(), self.rng.randrange(2**31), size, size)

    async def ask(self, job: Job, **fields: object) -> str:
        """What a customer sees who asks for this picture once."""
        body = json.dumps(fields_of(job) | fields).encode()
        try:
            async with asyncio.timeout(PATIENCE_S):
                answer = await self.supervisor.exchange("POST", "/generate", body)
        except TimeoutError:
            return "silence"
        except ConnectionRefusedError:
            return "refused"
        except (OSError, EOFError, BenchError):
            return "cut"
        return label_of(answer, job)

    async def insist(self, job: Job, seen: Counter[str]) -> None:
        """Asks until the picture is there, as a customer does who wants it."""
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            label = await self.ask(job)
            seen[label] += 1
            if label == RIGHT:
                return
            await asyncio.sleep(AGAIN_S)
        self.never += 1

    async def crowd(self, customers: int, done: asyncio.Event) -> Counter[str]:
        """Customers who want one picture after the other until `done`, whatever happens to others."""
        seen: Counter[str] = Counter()
        self.crowded = customers

        async def customer(rng: random.Random) -> None:
            while not done.is_set():
                await self.insist(Job(f"bystander {rng.random()}", rng.randrange(2**31), 64, 64), seen)

        await asyncio.gather(*(customer(random.Random(self.rng.random())) for _ in range(customers)))
        return seen

    async def together(self, jobs: Iterable[Job]) -> Counter[str]:
        return Counter(await asyncio.gather(*(self.ask(job) for job in jobs)))

    def strike(self) -> None:
        self.struck = time.monotonic()

    async def recover(self) -> None:
        """Waits for the next right picture, and notes how long after the strike it came."""
        await self.insist(self.order(), Counter())
        self.recovered.append(time.monotonic() - self.struck)

    def long_orders(self, batches: int) -> list[Job]:
        """Orders that take the engine half a second each, since their sizes differ."""
        return [self.order("[[slow]]", 96 + 32 * i) for i in range(batches)]

    async def accepted(self, orders: Sequence[asyncio.Task[str]]) -> None:
        """Returns when the server has taken all of these orders in: they and the whole crowd wait, run, or are done."""
        end = time.monotonic() + PATIENCE_S
        while True:
            done = sum(order.done() for order in orders)  # before the look inside: none may count twice
            samples = await self.supervisor.samples()
            inside = samples["sana_sprint_jobs_waiting"] + samples["sana_sprint_jobs_running"]
            if done == len(orders) or inside + done >= len(orders) + self.crowded:
                return
            if time.monotonic() > end:
                raise BenchError(f"{len(orders)} orders were never inside at the same time")
            await asyncio.sleep(0.005)


def fields_of(job: Job) -> dict[str, object]:
    return {"prompt": job.prompt, "seed": job.seed, "width": job.width, "height": job.height}


def label_of(answer: Answer, job: Job) -> str:
    if answer.status == 200:
        with Image.open(io.BytesIO(answer.body)) as image:
            right = np.array_equal(np.asarray(image.convert("RGB")), expected_pixels(job))
        return RIGHT if right else "200 wrong picture"
    return f"{answer.status} {json.loads(answer.body).get('code', '')}".strip()
