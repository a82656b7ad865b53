"""Whether answered pictures are the ones that were asked for. Runs after the load, over the spooled bodies.

fake: each equals the colour field of its job, to the last byte. judge: each shows what its prompt says. alone: a sample
equals, within 1/255, what a fresh server makes of the same orders one at a time; a fresh one, because the first server
would answer from its cache of embeddings.
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
from bench.harness.load_generator import Order, Record, Traffic
from bench.harness.server_process import serving
from distill.world.captions import parse_caption
from distill.world.judge import judge
from engines.fake import expected_pixels
from engines.types import Job, Pixels

Check = Literal["none", "fake", "judge", "alone"]
SHOWN = 5


@dataclass(frozen=True, slots=True)
class Outcome:
    checked: int
    wrong: int
    reasons: tuple[str, ...] = ()  # of the first few


def run_check(
    check: Check, records: Sequence[Record], spool: int, size: tuple[int, int], flags: Sequence[str], sample: int
) -> Outcome:
    """Looks at the answered pictures in `spool` (a file descriptor). size: width, height where an order names none."""
    answered = [record for record in records if record.status == 200]
    if check == "none":
        return Outcome(0, 0)
    if check == "alone":
        chosen = random.Random(0).sample(answered, min(sample, len(answered)))
        return asyncio.run(_against_alone(chosen, spool, flags))
    fault = _fault_of_fake if check == "fake" else _fault_of_judge
    return _outcome([_described(record, fault(record, _read(record, spool), size)) for record in answered])


def _read(record: Record, spool: int) -> Pixels:
    offset, length = record.place
    return _pixels(os.pread(spool, length, offset))


def _pixels(content: bytes) -> Pixels:
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"))


def _fault_of_fake(record: Record, pixels: Pixels, size: tuple[int, int]) -> str:
    order = record.order
    width, height = order.width or size[0], order.height or size[1]
    wanted = expected_pixels(Job(order.prompt, order.seed, width, height, order.steps))
    return "" if np.array_equal(wanted, pixels) else "the picture of another job"


def _fault_of_judge(record: Record, pixels: Pixels, size: tuple[int, int]) -> str:
    width, height = record.order.width or size[0], record.order.height or size[1]
    if pixels.shape != (height, width, 3):
        return f"its shape is {list(pixels.shape)}, asked was {width}x{height}"
    return "; ".join(judge(pixels, parse_caption(record.order.prompt)).reasons)


async def _against_alone(chosen: Sequence[Record], spool: int, flags: Sequence[str]) -> Outcome:
    faults = []
    with serving(flags) as alone, tempfile.TemporaryFile() as own:
        traffic = Traffic(alone.url, own)
        for record in chosen:
            orders: list[Order] = [replace(record.order, timeout_ms=None)]
            (again,) = await traffic.closed_loop(orders, 1)
            if again.status != 200:
                raise BenchError(f"alone: got {again.status} {again.error} for seed {record.order.seed}")
            own.flush()
            one, other = _read(record, spool).astype(int), _read(again, own.fileno()).astype(int)
            worst = int(np.abs(one - other).max()) if one.shape == other.shape else 255
            faults.append(_described(record, f"differs by {worst}/255 from itself alone" if worst > 1 else ""))
        await traffic.close()
    return _outcome(faults)


def _described(record: Record, fault: str) -> str:
    return f"{record.order.prompt!r}, seed {record.order.seed}: {fault}" if fault else ""


def _outcome(faults: Sequence[str]) -> Outcome:
    wrong = [fault for fault in faults if fault]
    return Outcome(len(faults), len(wrong), tuple(wrong[:SHOWN]))
