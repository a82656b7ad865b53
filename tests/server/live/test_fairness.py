"""Twenty people draw at once: each gets a turn with the newest drawing, and no session or job is left over."""

import asyncio
import json
import statistics
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import pytest
from live_client import live
from program import serving
from prometheus_client.parser import text_string_to_metric_families
from running_server import PATIENCE_S, Running, Serve, image_file, wait_until
from websockets.asyncio.client import ClientConnection, connect

from engines.fake import FakeEngine
from engines.types import Deliver, Job, Pixels, RawImage

SESSIONS = 20
BATCH = 8


class SteppedEngine(FakeEngine):
    """Runs one batch for each `steps.release()`; `seen` lists the jobs of every batch that began."""

    def __init__(self) -> None:
        super().__init__(max_batch=BATCH)
        self.steps = threading.Semaphore(0)
        self.seen: list[list[Job]] = []

    def generate(self, jobs: Sequence[Job], deliver: Deliver | None = None) -> list[RawImage]:
        self.seen.append(list(jobs))
        assert self.steps.acquire(timeout=PATIENCE_S), "the test never let the batch run"
        return super().generate(jobs, deliver)

    def close(self) -> None:
        self.steps.release(1000)
        super().close()


def mark(session: int, number: int) -> Pixels:
    """Returns a drawing that encodes its session and number."""
    return np.full((1, 1, 3), (session, number, 255), np.uint8)


def marks(jobs: Sequence[Job]) -> list[tuple[int, int]]:
    """Returns session and number of each job's drawing."""
    drawings = [job.control_image for job in jobs]
    return [(int(pixels[0, 0, 0]), int(pixels[0, 0, 1])) for pixels in drawings if pixels is not None]


def waiting(running: Running) -> list[tuple[int, int]]:
    queue = running.service.scheduler._queue
    with queue._filled:
        return marks([entry.job for group in queue._waiting.values() for entry in group.values()])


def test_every_turn_comes_within_three_batches_and_shows_the_newest(serve: Serve) -> None:
    engine = SteppedEngine()
    running = serve(engine)
    blocker = running.submit_generate()
    wait_until(lambda: engine.seen, "the first batch")
    with ExitStack() as stack:
        clients = [stack.enter_context(live(running)) for _ in range(SESSIONS)]
        for session, client in enumerate(clients):
            client.draw(mark(session, 0))
            client.set(prompt="a red circle", width=32, height=32)
            running.wait_for_queued(session + 1)
        for number in range(1, 10):
            for session, client in enumerate(clients):
                client.draw(mark(session, number))
            left = SESSIONS if number == 1 else SESSIONS - BATCH
            wait_until(
                lambda left=left, number=number: [n for _, n in waiting(running)] == [number] * left,
                f"drawing {number} in every job that waits",
            )
            engine.steps.release()
            wait_until(lambda number=number: len(engine.seen) == number + 1, "the next batch")
            assert {shown for _, shown in marks(engine.seen[number])} == {number}
        engine.steps.release(1000)
    turns = [[session for session, _ in marks(jobs)] for jobs in engine.seen[1:10]]
    assert [len(batch) for batch in turns] == [BATCH] * 9
    for first in range(7):
        assert {*turns[first], *turns[first + 1], *turns[first + 2]} == set(range(SESSIONS)), f"batches from {first}"
    assert blocker.result().status_code == 200
    wait_until(lambda: running.metric("sana_sprint_live_sessions") == 0, "the end of the sessions")
    assert running.waiting == 0


# --- the same with clocks: python -m pytest -m slow tests/server/live/test_fairness.py -s -------------------------

ENGINE_MS = 20
SECONDS = 120
PERIOD_S = 0.1  # ten drawings a second
KILLED = 5


@dataclass
class Seen:
    """The images and timings that one session received."""

    sent: list[float] = field(default_factory=list)  # when each message left; message i has the number i + 1
    shown: int = 0
    ages_ms: list[float] = field(
        default_factory=list
    )  # of each drawing, when the image that shows it (or a newer) came
    engine_ms: list[float] = field(default_factory=list)  # how long the batch of each image took
    server_ms: list[float] = field(default_factory=list)  # of each image, from its newest drawing's receipt to pixels
    longest_gap_ms: float = 0.0
    images: int = 0


async def draw_for(address: str, seconds: float, seen: Seen, drawings: Sequence[bytes], delay: float) -> None:
    await asyncio.sleep(delay)
    async with connect(address, compression=None, proxy=None) as socket:
        await socket.recv()
        receiving = asyncio.create_task(watch(socket, seen))
        await send(socket, seen, json.dumps({"prompt": "a red circle", "width": 64, "height": 64}))
        end = time.monotonic() + seconds
        following = time.monotonic()
        while time.monotonic() < end:
            await send(socket, seen, drawings[len(seen.sent) % len(drawings)])
            following += PERIOD_S
            await asyncio.sleep(max(0.0, following - time.monotonic()))
        while seen.shown < len(seen.sent):
            await asyncio.sleep(PERIOD_S)
        receiving.cancel()


async def send(socket: ClientConnection, seen: Seen, message: str | bytes) -> None:
    seen.sent.append(time.monotonic())
    await socket.send(message)


async def watch(socket: ClientConnection, seen: Seen) -> None:
    last = time.monotonic()
    while True:
        header = json.loads(await socket.recv())
        assert header["type"] == "picture", header
        await socket.recv()
        now = time.monotonic()
        seen.ages_ms += [1000 * (now - sent) for sent in seen.sent[seen.shown : header["sequence"]]]
        timings = header["timings_ms"]
        seen.server_ms.append(timings["total"] - timings["encode"])
        seen.engine_ms.append(timings["text"] + timings["denoise"] + timings["decode"])
        seen.shown = header["sequence"]
        seen.longest_gap_ms = max(seen.longest_gap_ms, 1000 * (now - last))
        last = now
        seen.images += 1


async def vanish(address: str, drawings: Sequence[bytes]) -> None:
    """Draws for a while, then is killed without a farewell."""
    async with connect(address, compression=None, proxy=None) as socket:
        await socket.recv()
        await socket.send(json.dumps({"prompt": "a blue square", "width": 64, "height": 64}))
        for drawing in drawings:
            await socket.send(drawing)
            await asyncio.sleep(PERIOD_S)
        socket.transport.abort()


def metrics(url: str) -> dict[str, float]:
    families = text_string_to_metric_families(httpx.get(url + "/metrics").text)
    return {sample.name: sample.value for family in families for sample in family.samples if not sample.labels}


def percentile(values: Sequence[float], share: float) -> float:
    return statistics.quantiles(values, n=1000, method="inclusive")[round(1000 * share) - 1]


@pytest.mark.slow
def test_two_minutes_of_twenty_people() -> None:
    rng = np.random.default_rng(0)
    drawings = [image_file((rng.random((64, 64, 1)) > 0.95).repeat(3, 2).astype(np.uint8) * 255) for _ in range(16)]
    seen = [Seen() for _ in range(SESSIONS)]
    memory: list[tuple[float, float]] = []
    with serving("--backend", "fake", "--fake-delay-ms", str(ENGINE_MS), "--log-level", "warning") as url:
        address = url.replace("http", "ws") + "/v1/live"

        async def all_draw() -> None:
            people = [
                draw_for(address, SECONDS, one, drawings, delay=index * PERIOD_S / SESSIONS)
                for index, one in enumerate(seen)
            ]
            killed = [vanish(address, drawings) for _ in range(KILLED)]
            await asyncio.gather(*people, *killed, look())

        async def look() -> None:
            for _ in range(SECONDS // 10):
                await asyncio.sleep(10)
                found = await asyncio.to_thread(metrics, url)
                memory.append((found["process_resident_memory_bytes"] / 2**20, found["process_open_fds"]))

        before = metrics(url)
        asyncio.run(all_draw())
        wait_until(lambda: metrics(url)["sana_sprint_live_sessions"] == 0, "the end of all sessions")
        after = metrics(url)
    ages = [age for one in seen for age in one.ages_ms]
    inside = [age for one in seen for age in one.server_ms]
    engine_ms = statistics.median(ms for one in seen for ms in one.engine_ms)
    report: dict[str, Any] = {
        "drawings": sum(len(one.sent) for one in seen),
        "images": sum(one.images for one in seen),
        "fewest_images_of_a_session": min(one.images for one in seen),
        "longest_gap_ms": max(one.longest_gap_ms for one in seen),
        "drawing_to_image_ms": {share: round(percentile(ages, share), 1) for share in (0.5, 0.95, 0.99, 0.999)},
        "in_the_server_ms": {share: round(percentile(inside, share), 1) for share in (0.5, 0.95, 0.99, 0.999)},
        "engine_ms": round(engine_ms, 1),
        "worst_median_of_a_session_ms": max(statistics.median(one.ages_ms) for one in seen),
        "memory_mib": [round(mib, 1) for mib, _ in memory],
        "open_files": [int(files) for _, files in memory],
    }
    print("\n" + json.dumps(report, indent=2))
    assert all(one.shown == len(one.sent) for one in seen)  # the last drawing of everyone
    assert percentile(inside, 0.95) <= 3 * engine_ms
    assert all(one.images > 0.5 * SECONDS / PERIOD_S for one in seen)
    assert memory[-1][0] - memory[1][0] < 5
    assert after["process_open_fds"] == before["process_open_fds"]
