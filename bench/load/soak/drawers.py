"""People who draw over WS /v1/live: sessions that come and go, each picture held against the message that it shows."""

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

from bench.load.soak.ledger import Ledger
from bench.load.soak.orders import picture_file
from bench.robustness.scenario import PATIENCE_S, RIGHT, SUBJECTS
from engines.fake import expected_pixels
from engines.types import Job, Pixels

KIND = "live"
BUSY = "429 queue_full"
BAD = ("422 invalid_value", "422 invalid_size")
MESSAGES = 30  # of a session, at most
PAUSE_S = (0.2, 3.0)
BAD_SETTINGS: tuple[Mapping[str, object], ...] = ({"width": 33}, {"strength": 7}, {"colour": "red"})


@dataclass
class Session:
    """What a client has said: the job that each of its messages made, by number."""

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

    async def heard(self) -> tuple[dict[str, Any], bytes]:
        """The next message, and the file behind a picture."""
        told: dict[str, Any] = json.loads(await self.socket.recv())
        content = await self.socket.recv() if told["type"] == "picture" else b""
        assert isinstance(content, bytes)
        return told, content


async def drawer(url: str, rng: random.Random, ledger: Ledger, began: float, over: asyncio.Event) -> None:
    """One session after the other until `over`."""
    while not over.is_set():
        try:
            async with asyncio.timeout(PATIENCE_S * 2):
                await _session(url, rng, ledger, began, over)
        except TimeoutError:
            ledger.tell(KIND, "silence", ())
        except (OSError, ConnectionClosed) as error:
            ledger.tell(KIND, f"cut: {error}", ())
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(over.wait(), rng.uniform(*PAUSE_S))


async def _session(url: str, rng: random.Random, ledger: Ledger, began: float, over: asyncio.Event) -> None:
    address = url.replace("http", "ws") + "/v1/live"
    async with connect(address, proxy=None, max_size=2**24, compression=None) as socket:
        greeting = json.loads(await socket.recv())
        session = Session(socket, greeting["seed"])
        session.settings |= {"prompt": _prompt(rng), "width": 128, "height": 128, "output_format": "png"}
        await session.send(json.dumps(session.settings))
        for _ in range(rng.randrange(1, MESSAGES)):
            if over.is_set():
                return
            at = time.monotonic()
            await _until_shown(session, ledger)
            ledger.timed(time.monotonic() - began, KIND, time.monotonic() - at)
            await asyncio.sleep(rng.uniform(*PAUSE_S) / 4)
            for _ in range(rng.choice((1, 1, 1, 4))):  # four at once: three may be overtaken
                await _say(session, rng, ledger)
        if rng.random() < 0.3:
            socket.transport.abort()  # as a phone that lost its network


async def _say(session: Session, rng: random.Random, ledger: Ledger) -> None:
    """A drawing, another prompt, or settings that cannot be."""
    chance = rng.random()
    if chance < 0.05:
        session.sent += 1
        await session.socket.send(json.dumps(rng.choice(BAD_SETTINGS)))
        while (told := await session.heard())[0]["type"] == "picture":
            _judge(session, told, ledger)
        _refused(told[0], ledger)
        session.settings["seed"] = rng.randrange(2**31)
        await session.send(json.dumps(session.settings))  # whole: a size that cannot be stays until it is set anew
    elif chance < 0.2:
        session.settings["prompt"] = _prompt(rng)
        await session.send(json.dumps({"prompt": session.settings["prompt"]}))
    else:
        file, session.drawing = picture_file(rng)
        await session.send(file)


async def _until_shown(session: Session, ledger: Ledger) -> None:
    """Waits for the picture of the newest message."""
    shown = 0
    while shown < session.sent:
        told, content = await session.heard()
        if told["type"] == "picture":
            shown = told["sequence"]
            _judge(session, (told, content), ledger)
        else:
            _refused(told, ledger)


def _judge(session: Session, shown: tuple[dict[str, Any], bytes], ledger: Ledger) -> None:
    told, content = shown
    job = session.jobs.get(told["sequence"])
    with Image.open(io.BytesIO(content)) as image:
        right = job is not None and np.array_equal(np.asarray(image.convert("RGB")), expected_pixels(job))
    ledger.tell(KIND, RIGHT if right else "wrong picture", (RIGHT,))
    for number in [number for number in session.jobs if number < told["sequence"]]:
        del session.jobs[number]


def _refused(told: dict[str, Any], ledger: Ledger) -> None:
    ledger.tell(KIND, f"{told.get('status', told['type'])} {told['code']}", (*BAD, BUSY))


def _prompt(rng: random.Random) -> str:
    return f"{rng.choice(SUBJECTS)} {rng.randrange(2000)}"
