"""Makers of images: an engine in this process, an engine in a child process, or a server over HTTP.

A maker serves one thread. For a prompt and seed all make the same image, up to rounding.
"""

import base64
import http.client
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch

from bench.harness.errors import BenchError
from bench.quality.images.layouts import ImageFile, decoded
from engines.checkpoints.checkpoint import open_checkpoint
from engines.errors import SprintError
from engines.loader import load_engine
from engines.types import Job, Pixels

TIMEOUT_S = 600.0  # for one answer of a server, and in all for one that is full
MAX_IMAGES = 8  # of one request


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """Options common to all images. size: (width, height), None: the checkpoint's."""

    steps: int = 1
    guidance: float = 4.5
    size: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class FileResult:
    """The images of one file, in the order of its seeds."""

    images: list[Pixels]
    prompt_truncated: bool


class Maker(Protocol):
    @property
    def facts(self) -> Mapping[str, Any]:
        """The origin of the images: checkpoint, weights, backend, precision, device, versions."""

    @property
    def batch(self) -> int:
        """The largest number of images made at once."""

    def make(self, files: Sequence[ImageFile]) -> list[FileResult]: ...

    def close(self) -> None: ...


class EngineMaker:
    """Makes images with an engine in this process."""

    def __init__(self, model: str, sampling: SamplingOptions, **options: Any) -> None:
        """options: of engines.loader.load_engine."""
        checkpoint = open_checkpoint(model, options.get("decoder"))
        self._engine, self._asked = load_engine(checkpoint, **options), sampling
        info = self._engine.info
        names = ("checkpoint", "backend", "precision", "device", "versions")
        self.facts = {name: asdict(info)[name] for name in names} | {
            "weights": checkpoint.weights.sha256(),
            "decoder": options.get("decoder"),
            "schedule": options.get("schedule", "paper"),
            "engine": None if info.manifest is None else info.manifest["fingerprint"],
            "size": list(sampling.size or self._engine.limits.default_size),
        }

    @property
    def batch(self) -> int:
        return self._engine.limits.max_batch

    def make(self, files: Sequence[ImageFile]) -> list[FileResult]:
        width, height = self._asked.size or self._engine.limits.default_size
        steps, guidance = self._asked.steps, self._asked.guidance
        jobs = [Job(file.prompt, seed, width, height, steps, guidance) for file in files for seed in file.seeds]
        results = [
            image
            for first in range(0, len(jobs), self.batch)
            for image in self._engine.generate(jobs[first : first + self.batch])
        ]
        images = iter(results)
        return [_file_result([(next(images)) for _ in file.seeds]) for file in files]

    def close(self) -> None:
        self._engine.close()


def _file_result(images: Sequence[Any]) -> FileResult:
    return FileResult([image.pixels for image in images], any(image.prompt_truncated for image in images))


class ProcessMaker:
    """Makes images with an engine in a child process; `environment` may select its card."""

    def __init__(
        self, model: str, sampling: SamplingOptions, environment: Mapping[str, str], threads: int | None, **options: Any
    ) -> None:
        context = get_context("spawn")
        self._pipe, worker_end = context.Pipe()
        arguments = (worker_end, model, sampling, dict(environment), threads, options)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        worker_end.close()
        self._ready: tuple[Mapping[str, Any], int] | None = None

    @property
    def facts(self) -> Mapping[str, Any]:
        return self._wait_ready()[0]

    @property
    def batch(self) -> int:
        return self._wait_ready()[1]

    def _wait_ready(self) -> tuple[Mapping[str, Any], int]:
        """Waits for the engine; several load at the same time."""
        if self._ready is None:
            self._ready = self._receive()
        return self._ready

    def make(self, files: Sequence[ImageFile]) -> list[FileResult]:
        self._wait_ready()
        self._pipe.send(list(files))
        results: list[FileResult] = self._receive()
        return results

    def _receive(self) -> Any:
        try:
            response = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise BenchError(f"a worker's process died (exit {self._process.exitcode})") from None
        if isinstance(response, Exception):
            raise response
        return response

    def close(self) -> None:
        with suppress(OSError):
            self._pipe.send(None)
        self._pipe.close()
        self._process.join(TIMEOUT_S)


def _serve(
    pipe: Connection,
    model: str,
    sampling: SamplingOptions,
    environment: dict[str, str],
    threads: int | None,
    options: dict[str, Any],
) -> None:
    os.environ.update(environment)
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        maker = EngineMaker(model, sampling, **options)
        pipe.send((maker.facts, maker.batch))
        with suppress(EOFError):
            while (files := pipe.recv()) is not None:
                pipe.send(maker.make(files))
        maker.close()
    except SprintError as error:  # raised again where the answer is awaited
        pipe.send(error)


class HttpMaker:
    """Makes images with a running server: one connection, one request at a time, always PNG."""

    batch = 1  # the server batches concurrent requests

    def __init__(
        self, url: str, sampling: SamplingOptions, key: str | None = None, wait: Callable[[float], None] = time.sleep
    ):
        """key: of the API, where the server wants one. wait: for a server that is full. Raises BenchError."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/"):
            raise BenchError(f"url: got {url!r}, needed is http://host:port")
        secure = parts.scheme == "https"
        connection_type = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        self._connection = connection_type(parts.hostname, parts.port, timeout=TIMEOUT_S)
        self._asked, self._wait = sampling, wait
        self._headers = {"accept": "application/json", "content-type": "application/json"}
        if key is not None:
            self._headers["authorization"] = f"Bearer {key}"
        info = self._exchange("GET", "/v1/info", None)
        names = ("checkpoint", "backend", "precision", "device", "versions")
        self._size = sampling.size or tuple(info["default_size"])
        self.facts = {name: info[name] for name in names} | {
            "engine": (info.get("manifest") or {}).get("fingerprint"),
            "size": list(self._size),
        }

    def make(self, files: Sequence[ImageFile]) -> list[FileResult]:
        return [self._file(file) for file in files]

    def _file(self, file: ImageFile) -> FileResult:
        images: list[Pixels] = []
        truncated = False
        for first in range(0, len(file.seeds), MAX_IMAGES):
            seeds = file.seeds[first : first + MAX_IMAGES]
            response = self._exchange("POST", "/generate", self._body(file.prompt, seeds))
            returned = [image["seed"] for image in response["images"]]
            if returned != list(seeds):
                raise BenchError(f"{file.name}: asked for the seeds {list(seeds)}, the server answered {returned}")
            images += [decoded(base64.b64decode(image["b64"])) for image in response["images"]]
            truncated |= response["prompt_truncated"]
        return FileResult(images, truncated)

    def _body(self, prompt: str, seeds: Sequence[int]) -> dict[str, Any]:
        return {
            "prompt": prompt,
            "seed": seeds[0],
            "num_images": len(seeds),
            "num_inference_steps": self._asked.steps,
            "guidance_scale": self._asked.guidance,
            "width": self._size[0],
            "height": self._size[1],
            "output_format": "png",
        }

    def _exchange(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        """Returns the response's JSON. Waits for Retry-After if the server is full; retries nothing else."""
        waited_s = 0.0
        while True:
            try:
                self._connection.request(method, path, None if body is None else json.dumps(body), self._headers)
                response = self._connection.getresponse()
                content = response.read()
            except (OSError, http.client.HTTPException) as error:
                self._connection.close()
                raise BenchError(
                    f"{method} {path}: {error!r}; finished images are kept, start again to continue"
                ) from error
            if response.status == 200:
                return json.loads(content)
            pause_s = float(response.headers.get("retry-after", 1))
            if response.status not in (429, 503) or waited_s + pause_s > TIMEOUT_S:
                detail = content.decode(errors="replace")[:300]
                raise BenchError(f"{method} {path}: got {response.status}, needed is 200: {detail}")
            self._wait(pause_s)
            waited_s += pause_s

    def close(self) -> None:
        self._connection.close()
