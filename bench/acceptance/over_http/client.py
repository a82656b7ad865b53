"""Measures a running server as a client: single requests, closed loops, drawings and memory."""

import asyncio
import base64
import io
import json
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

import numpy as np
from PIL import Image
from websockets.sync.client import connect

from bench.harness.errors import BenchError
from bench.harness.http_client import ConnectionPool
from bench.harness.load_generator import ImageRequest, LoadGenerator
from bench.harness.prometheus_text import parse_samples
from bench.harness.summary import percentiles
from engines.checkpoints.checkpoint import Checkpoint
from engines.models.instruction import INSTRUCTION
from engines.pipeline.prompt_tokenizer import PromptTokenizer

PATIENCE_S = 120.0
AT_ONCE = 8  # requests
USED = 'sana_sprint_gpu_memory_bytes{kind="used"}'


def fresh_prompts(checkpoint: Checkpoint, tokens: int) -> Iterator[str]:
    """Yields different prompts without end, each of `tokens` tokens behind the instruction where words allow it."""
    settings = checkpoint.settings
    instruction = INSTRUCTION if settings.instruction else ""
    tokenizer = PromptTokenizer(checkpoint.load_tokenizer(), instruction, settings.max_prompt_tokens)
    number = 0
    while True:
        prompt = f"{number}"
        number += 1
        while len(tokenizer.encode(prompt).tokens.ids) - len(tokenizer.prefix) < tokens:
            prompt += " qx"[len(prompt) % 3]
        yield prompt


def alone(url: str, prompts: Iterator[str], runs: int, **fields: Any) -> dict[str, Any]:
    """Sends `runs` requests one after the other, each with a new prompt.

    Returns milliseconds, the stages' medians and the last response's bytes. Raises BenchError.
    """

    async def ask() -> dict[str, Any]:
        pool, took, stages, size = ConnectionPool(url), [], list[dict[str, float]](), 0
        try:
            for seed in range(runs):
                body = json.dumps({"prompt": next(prompts), "seed": seed, **fields}).encode()
                began = time.perf_counter()
                answer = await asyncio.wait_for(pool.exchange("POST", "/generate", body), PATIENCE_S)
                took.append((time.perf_counter() - began) * 1e3)
                if answer.status != 200:
                    raise BenchError(f"POST /generate: got {answer.status}: {answer.body[:200]!r}")
                stages.append(stages_of(answer.headers.get("server-timing", "")))
                size = len(answer.body)
        finally:
            await pool.close()
        medians = {name: round(median(one[name] for one in stages), 3) for name in stages[0]}
        return {"ms": percentiles(took), "stages": medians, "bytes": size}

    return asyncio.run(ask())


def stages_of(header: str) -> dict[str, float]:
    """Returns a Server-Timing header's milliseconds by stage."""
    return {name: float(value) for name, value in re.findall(r"(\w+);dur=([\d.]+)", header)}


def at_once(url: str, prompts: Iterator[str], count: int, rounds: int) -> dict[str, Any]:
    """Sends `count` requests together to an idle server, `rounds` times. Returns mean milliseconds of a response."""
    found = [closed_loop(url, prompts, count, 1)["ms"] for _ in range(rounds)]
    return {"mean_ms": round(sum(one["mean"] for one in found) / rounds, 3), "rounds": rounds}


def closed_loop(url: str, prompts: Iterator[str], clients: int, each: int) -> dict[str, Any]:
    """Sends `clients * each` JPEG requests, `clients` at a time.

    Returns images per second, and milliseconds of a response. Raises BenchError.
    """

    async def send() -> dict[str, Any]:
        with tempfile.TemporaryFile() as spool:
            traffic = LoadGenerator(url, spool, timeout_s=PATIENCE_S)
            orders = [ImageRequest(next(prompts), seed, 1, "jpeg") for seed in range(clients * each)]
            began = time.perf_counter()
            records = await traffic.closed_loop(orders, clients)
            seconds = time.perf_counter() - began
            await traffic.close()
        good = [record.seconds * 1e3 for record in records if record.status == 200]
        if len(good) < len(records):
            failed = next(record for record in records if record.status != 200)
            raise BenchError(f"{len(records) - len(good)} of {len(records)} failed: {failed.status} {failed.error}")
        return {"per_second": round(len(good) / seconds, 2), "ms": percentiles(good)}

    return asyncio.run(send())


def drawing(url: str, prompts: Iterator[str], runs: int) -> dict[str, Any]:
    """Sends `runs` new drawings to WS /v1/live. Returns milliseconds from sending one to its image's last byte."""
    took = []
    with connect(url.replace("http", "ws", 1) + "/v1/live", open_timeout=PATIENCE_S, proxy=None) as socket:
        _expect_message(socket.recv(PATIENCE_S), "ready")
        socket.send(json.dumps({"prompt": next(prompts), "seed": 1}))
        sequence = 1
        for run in range(runs):
            content = base64.b64decode(strokes(run))
            began = time.perf_counter()
            socket.send(content)
            sequence += 1
            while True:
                header = _expect_message(socket.recv(PATIENCE_S), "picture")
                socket.recv(PATIENCE_S)
                if header["sequence"] >= sequence:
                    break
            took.append((time.perf_counter() - began) * 1e3)
    return {"ms": percentiles(took)}


def strokes(number: int) -> str:
    """Returns a PNG in base64: a white bar on black, at a position that `number` sets."""
    pixels = np.zeros((256, 256, 3), np.uint8)
    pixels[100:110, 2 * number % 200 : 2 * number % 200 + 40] = 255
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def get_body(url: str, path: str) -> bytes:
    """Returns the body of GET `path`. Raises BenchError where the status is not 200."""

    async def get() -> bytes:
        with tempfile.TemporaryFile() as spool:
            traffic = LoadGenerator(url, spool, timeout_s=PATIENCE_S)
            answer = await traffic.get(path)
            await traffic.close()
            return answer.body

    return asyncio.run(get())


def memory(url: str) -> dict[str, Any]:
    """Returns the memory metrics of the server, in bytes; without NVML nvidia-smi reports the card's."""
    found: dict[str, Any] = {
        name: value
        for name, value in parse_samples(get_body(url, "/metrics").decode()).items()
        if name.startswith(("sana_sprint_gpu_memory_bytes", "process_resident_memory_bytes"))
    }
    if USED not in found and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        mebibytes = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
        found |= {USED: int(mebibytes[0]) * 2**20} if mebibytes and mebibytes[0].isdigit() else {}
    return found


def _expect_message(message: str | bytes, kind: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(message) if isinstance(message, str) else {"type": "bytes"}
    if found.get("type") != kind:
        raise BenchError(f"live: got {found}, expected {kind}")
    return found


Measure = Callable[[], dict[str, Any]]


def figures_of(
    url: str, prompts: Iterator[str], *, runs: int, clients: Sequence[int], each: int, control: bool
) -> Iterator[tuple[str, Measure]]:
    """Yields name and measurement of each figure of a ready server, the most important first."""

    def single(**fields: Any) -> Measure:
        return lambda: alone(url, prompts, runs, **fields)

    yield "first request", lambda: alone(url, prompts, 1, output_format="jpeg")
    yield "jpeg alone", single(output_format="jpeg")
    for count in sorted(clients, reverse=True):
        yield f"closed loop {count}", lambda n=count: closed_loop(url, prompts, n, each)  # type: ignore[misc]  # default
    yield f"{AT_ONCE} at once", lambda: at_once(url, prompts, AT_ONCE, max(1, runs // 5))
    for steps in (2, 4):
        yield f"{steps} steps alone", single(output_format="jpeg", num_inference_steps=steps)
    yield "png alone", single(output_format="png")
    yield "memory", lambda: memory(url)
    if control:
        yield "controlnet alone", single(output_format="jpeg", control_image=strokes(0))
        yield "live", lambda: drawing(url, prompts, runs)
    yield "webp alone", single(output_format="webp")
