"""Checks after the run that the spooled images are the requested ones.

fake: each image equals its job's colour field, byte for byte. judge: each shows its prompt. rerun: a sample equals,
within 1/255, the same requests sent one at a time to a fresh server. A fresh one, because the first would answer from
its cache of embeddings.
"""

import asyncio
import io
import os
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from PIL import Image

from bench.harness.errors import BenchError
from bench.harness.load_generator import ImageRequest, LoadGenerator, RequestRecord
from bench.harness.server_process import running_server
from distill.world.captions import parse_caption
from distill.world.judge import judge
from engines.fake import expected_pixels
from engines.types import Job, Pixels

Check = Literal["none", "fake", "judge", "rerun"]
MAX_REASONS = 5


@dataclass(frozen=True, slots=True)
class CheckResult:
    checked: int
    wrong: int
    reasons: tuple[str, ...] = ()  # of the first few


def run_check(
    check: Check, records: Sequence[RequestRecord], spool: int, size: tuple[int, int], flags: Sequence[str], sample: int
) -> CheckResult:
    """Checks the images in `spool`, a file descriptor. size: (width, height) of requests that name none."""
    answered = [record for record in records if record.status == 200]
    if check == "none":
        return CheckResult(0, 0)
    if check == "rerun":
        sampled = random.Random(0).sample(answered, min(sample, len(answered)))
        return asyncio.run(_check_rerun(sampled, spool, flags))
    problem = _check_fake if check == "fake" else _check_judge
    return _outcome([_describe(record, problem(record, _read(record, spool), size)) for record in answered])


def _read(record: RequestRecord, spool: int) -> Pixels:
    offset, length = record.spool_range
    return _pixels(os.pread(spool, length, offset))


def _pixels(content: bytes) -> Pixels:
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"))


def _check_fake(record: RequestRecord, pixels: Pixels, size: tuple[int, int]) -> str:
    request = record.request
    width, height = request.width or size[0], request.height or size[1]
    expected = expected_pixels(Job(request.prompt, request.seed, width, height, request.steps))
    return "" if np.array_equal(expected, pixels) else "the image of another job"


def _check_judge(record: RequestRecord, pixels: Pixels, size: tuple[int, int]) -> str:
    width, height = record.request.width or size[0], record.request.height or size[1]
    if pixels.shape != (height, width, 3):
        return f"its shape is {list(pixels.shape)}, asked was {width}x{height}"
    return "; ".join(judge(pixels, parse_caption(record.request.prompt)).reasons)


async def _check_rerun(sampled: Sequence[RequestRecord], spool: int, flags: Sequence[str]) -> CheckResult:
    problems = []
    with running_server(flags) as rerun_server, tempfile.TemporaryFile() as rerun_spool:
        generator = LoadGenerator(rerun_server.url, rerun_spool)
        for record in sampled:
            requests: list[ImageRequest] = [replace(record.request, timeout_ms=None)]
            (rerun,) = await generator.closed_loop(requests, 1)
            if rerun.status != 200:
                raise BenchError(f"rerun: got {rerun.status} {rerun.error} for seed {record.request.seed}")
            rerun_spool.flush()
            first, second = _read(record, spool).astype(int), _read(rerun, rerun_spool.fileno()).astype(int)
            worst = int(np.abs(first - second).max()) if first.shape == second.shape else 255
            problems.append(_describe(record, f"differs by {worst}/255 from itself alone" if worst > 1 else ""))
        await generator.close()
    return _outcome(problems)


def _describe(record: RequestRecord, problem: str) -> str:
    return f"{record.request.prompt!r}, seed {record.request.seed}: {problem}" if problem else ""


def _outcome(problems: Sequence[str]) -> CheckResult:
    wrong = [problem for problem in problems if problem]
    return CheckResult(len(problems), len(wrong), tuple(wrong[:MAX_REASONS]))
