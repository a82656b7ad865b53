"""Clients of WS /v1/live: sessions that come and go, and check each image against its message."""

import asyncio
import contextlib
import io
import json
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from bench.load.soak.counters import Counters
from bench.load.soak.requests import drawing_file
from bench.robustness.scenario import OK, REQUEST_TIMEOUT_S, SUBJECTS
from engines.fake import expected_pixels
from engines.types import Job, Pixels

ROUTE = "live"
QUEUE_FULL = "429 queue_full"
INVALID_SETTINGS = ("422 invalid_value", "422 invalid_size")
MAX_MESSAGES = 30  # of a session, at most
PAUSE_S = (0.2, 3.0)
BAD_SETTINGS: tuple[Mapping[str, object], ...] = ({"width": 33}, {"strength": 7}, {"colour": "red"})


@dataclass
class Session:
    """A session, and the job of each of its messages by number."""

    socket: ClientConnection
    seed: int
    settings: dict[str, Any] = field(default_factory=dict)
    drawing: Pixels | None = None
    sent: int = 0
    jobs: dict[int, Job] = field(default_factory=dict)

    async def send(self, message: str | bytes) -> None:
        self.sent += 1
        self.jobs[self.sent] = Job(
            self.settings["prompt"],
            self.settings.get("seed", self.seed),
            self.settings["width"],
            self.settings["height"],
            control_image=self.drawing,
        )
        await self.socket.send(message)

    async def receive(self) -> tuple[dict[str, Any], bytes]:
        """Returns the next message and, for an image, the file behind it."""
        header: dict[str, Any] = json.loads(await self.socket.recv())
        content = await self.socket.recv() if header["type"] == "picture" else b""
        assert isinstance(content, bytes)
        return header, content


async def live_client(url: str, rng: random.Random, counters: Counters, start_time: float, stop: asyncio.Event) -> None:
    """Runs one session after the other until `stop`."""
    while not stop.is_set():
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S * 2):
                await _session(url, rng, counters, start_time, stop)
        except TimeoutError:
            counters.count(ROUTE, "silence", ())
        except (OSError, ConnectionClosed) as error:
            counters.count(ROUTE, f"cut: {error}", ())
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), rng.uniform(*PAUSE_S))


async def _session(url: str, rng: random.Random, counters: Counters, start_time: float, stop: asyncio.Event) -> None:
    address = url.replace("http", "ws") + "/v1/live"
    async with connect(address, proxy=None, max_size=2**24, compression=None) as socket:
        greeting = json.loads(await socket.recv())
        session = Session(socket, greeting["seed"])
        session.settings |= {"prompt": _prompt(rng), "width": 128, "height": 128, "output_format": "png"}
        await session.send(json.dumps(session.settings))
        for _ in range(rng.randrange(1, MAX_MESSAGES)):
            if stop.is_set():
                return
            sent_at = time.monotonic()
            await _wait_for_image(session, counters)
            counters.add_latency(time.monotonic() - start_time, ROUTE, time.monotonic() - sent_at)
            await asyncio.sleep(rng.uniform(*PAUSE_S) / 4)
            for _ in range(rng.choice((1, 1, 1, 4))):  # four at once: three may be superseded
                await _send_message(session, rng, counters)
        if rng.random() < 0.3:
            socket.transport.abort()  # like a phone without network


async def _send_message(session: Session, rng: random.Random, counters: Counters) -> None:
    """Sends a drawing, another prompt, or invalid settings."""
    chance = rng.random()
    if chance < 0.05:
        session.sent += 1
        await session.socket.send(json.dumps(rng.choice(BAD_SETTINGS)))
        while (header := await session.receive())[0]["type"] == "picture":
            _check_image(session, header, counters)
        _count_refusal(header[0], counters)
        session.settings["seed"] = rng.randrange(2**31)
        await session.send(json.dumps(session.settings))  # all settings: an invalid size stays until it is replaced
    elif chance < 0.2:
        session.settings["prompt"] = _prompt(rng)
        await session.send(json.dumps({"prompt": session.settings["prompt"]}))
    else:
        file, session.drawing = drawing_file(rng)
        await session.send(file)


async def _wait_for_image(session: Session, counters: Counters) -> None:
    """Waits for the image of the newest message."""
    received = 0
    while received < session.sent:
        header, content = await session.receive()
        if header["type"] == "picture":
            received = header["sequence"]
            _check_image(session, (header, content), counters)
        else:
            _count_refusal(header, counters)


def _check_image(session: Session, received: tuple[dict[str, Any], bytes], counters: Counters) -> None:
    header, content = received
    job = session.jobs.get(header["sequence"])
    with Image.open(io.BytesIO(content)) as image:
        correct = job is not None and np.array_equal(np.asarray(image.convert("RGB")), expected_pixels(job))
    counters.count(ROUTE, OK if correct else "wrong image", (OK,))
    for number in [number for number in session.jobs if number < header["sequence"]]:
        del session.jobs[number]


def _count_refusal(header: dict[str, Any], counters: Counters) -> None:
    counters.count(ROUTE, f"{header.get('status', header['type'])} {header['code']}", (*INVALID_SETTINGS, QUEUE_FULL))


def _prompt(rng: random.Random) -> str:
    return f"{rng.choice(SUBJECTS)} {rng.randrange(2000)}"
