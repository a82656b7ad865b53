"""A real server in a thread, its client, and a fake engine whose batches a test can hold."""

import io
import json
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import uvicorn
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from engines.fake import FakeEngine
from engines.types import Deliver, Engine, Job, Pixels, RawImage
from server.app import create_app
from server.http.state import AppState
from server.live.sessions import LiveSessions
from server.processes.uvicorn_server import uvicorn_config
from server.settings import Settings

PATIENCE_S = 30.0


def wait_until(condition: Callable[[], Any], what: str = "the condition", within_s: float = PATIENCE_S) -> None:
    """Waits for a condition; fails after `within_s`."""
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, f"timeout: {what}"
        time.sleep(0.002)


class GatedEngine(FakeEngine):
    """A fake engine that waits in `generate` until its gate is open; `seen` lists the jobs of each call."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.gate = threading.Event()
        self.busy = False
        self.seen: list[list[Job]] = []

    def generate(self, jobs: Sequence[Job], deliver: Deliver | None = None) -> list[RawImage]:
        self.seen.append(list(jobs))
        self.busy = True
        try:
            assert self.gate.wait(PATIENCE_S), "the test never opened the gate"
            return super().generate(jobs, deliver)
        finally:
            self.busy = False

    def wait_for_batch(self) -> None:
        wait_until(lambda: self.busy, "a batch")


@dataclass
class Running:
    """A running server at `url`, and its client."""

    url: str
    service: AppState
    live: LiveSessions
    server: uvicorn.Server
    left: list[int]  # exit codes that it would have ended with
    client: httpx.Client

    def generate(self, prompt: str = "a red circle", **body: Any) -> httpx.Response:
        return self.client.post("/generate", json={"prompt": prompt, "width": 64, "height": 64} | body)

    def submit_generate(self, prompt: str = "a red circle", **body: Any) -> "PendingResponse":
        """Sends a request from its own thread."""
        return PendingResponse(self, prompt, body)

    def metric(self, name: str, **labels: str) -> float:
        """Returns the value of one sample, or 0 before its first observation."""
        for family in text_string_to_metric_families(self.client.get("/metrics").text):
            for sample in family.samples:
                if sample.name == name and sample.labels == labels:
                    return sample.value
        return 0.0

    @property
    def waiting(self) -> int:
        return self.service.scheduler._queue.waiting

    def wait_for_queued(self, jobs: int) -> None:
        wait_until(lambda: self.waiting == jobs, f"a queue of {jobs}")


class PendingResponse:
    def __init__(self, running: Running, prompt: str, body: dict[str, Any]) -> None:
        self._response: httpx.Response | None = None
        self._error: Exception | None = None

        def send() -> None:
            try:
                self._response = running.generate(prompt, **body)
            except httpx.HTTPError as error:
                self._error = error

        self._thread = threading.Thread(target=send)
        self._thread.start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> httpx.Response:
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), "no response"
        if self._error is not None:
            raise self._error
        assert self._response is not None
        return self._response


def connect_and_send(running: Running, prompt: str, **fields: Any) -> socket.socket:
    """Sends a request and returns its connection, which a test can close."""
    parts = urlsplit(running.url)
    connection = socket.create_connection((parts.hostname, parts.port), timeout=PATIENCE_S)
    body = json.dumps({"prompt": prompt, "width": 64, "height": 64} | fields).encode()
    head = "POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    return connection


Serve = Callable[..., Running]


def start(stack: ExitStack, engine: Engine | Callable[[], Engine], *, ready: bool = True, **settings: Any) -> Running:
    left: list[int] = []
    chosen = Settings(**settings)
    app = create_app(engine, chosen, exit_process=left.append)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = uvicorn.Server(uvicorn_config(app, chosen))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="uvicorn")
    thread.start()
    client = httpx.Client(base_url=url, timeout=PATIENCE_S, limits=httpx.Limits(max_connections=200))
    running = Running(url, app.state.service, app.state.live, server, left, client)

    def stop() -> None:
        if isinstance(engine, GatedEngine):
            engine.gate.set()
        if isinstance(engine, FakeEngine):
            engine.close()
        client.close()
        server.should_exit = True
        thread.join(PATIENCE_S)
        listener.close()
        assert not thread.is_alive(), "the server did not stop"

    stack.callback(stop)
    wait_until(lambda: server.started, "the start of the server")
    if ready:
        wait_until(lambda: client.get("/health/ready").status_code == 200, "readiness")
    return running


def read_image(content: bytes) -> Pixels:
    with Image.open(io.BytesIO(content)) as image:
        return np.array(image.convert("RGB"), dtype=np.uint8)


def image_file(pixels: Pixels, image_format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, image_format, **options)
    return file.getvalue()
