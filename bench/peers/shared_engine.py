"""The engine that every peer serves: request to job, images to PNG files, as behind our server.

Runs in the peer's environment. BENCH_PEER_ENGINE selects the engine: fake:<milliseconds>, or a checkpoint.
"""

import os
import threading
from collections.abc import Sequence
from typing import Literal

import fpng
from pydantic import BaseModel, Field

from engines.fake import FakeEngine
from engines.types import Engine, Job

MAX_BATCH = 8
WAIT_S = 0.005  # a batch waits to be filled, where a peer has such a setting
PATH = "/generate"
ENGINE_VARIABLE = "BENCH_PEER_ENGINE"


class GenerateBody(BaseModel):
    """The request body that bench.harness.load_generator sends, validated."""

    prompt: str = Field(min_length=1, max_length=4000)
    seed: int = Field(ge=0)
    num_inference_steps: int = Field(1, ge=1, le=4)
    output_format: Literal["png"] = "png"


class SharedEngine:
    """An engine behind a lock: one thread at a time."""

    def __init__(self) -> None:
        name = os.environ[ENGINE_VARIABLE]
        self._engine: Engine
        if name.startswith("fake:"):
            self._engine = FakeEngine(max_batch=MAX_BATCH, delay_s=float(name.removeprefix("fake:")) / 1000)
        else:
            from engines.loader import load_engine

            self._engine = load_engine(name, max_batch=MAX_BATCH, threads_sleep=True)  # comparison.OPENMP
        self._engine.warmup()
        self._lock = threading.Lock()

    def job(self, body: GenerateBody) -> Job:
        width, height = self._engine.limits.default_size
        return Job(body.prompt, body.seed, width, height, body.num_inference_steps)

    def png_files(self, jobs: Sequence[Job]) -> list[bytes]:
        """Returns a PNG file for each job."""
        with self._lock:
            images = self._engine.generate(jobs)
        files = []
        for image in images:
            height, width, _ = image.pixels.shape
            file: bytes = fpng.from_bytes(image.pixels.tobytes(), width, height, 3)
            files.append(file)
        return files
