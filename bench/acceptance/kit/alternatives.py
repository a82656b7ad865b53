"""Times alternatives of kernels in one call, so that a card decides between them.

    python -m bench.acceptance.kit.alternatives

- Products of the transformer and of the text encoder's MLPs in bf16 and in e4m3, at the widths of 0.6B and 1.6B.
- A product of many rows by weights in bf16, and by weights in e4m3 that a kernel widens first.
- JPEG files by nvJPEG, of noise and of a smooth image.
- The expansion and its SiLU in e4m3: one kernel of ours, or cuBLAS and another launch.
- The number of contexts that a program of the linear attention loads at once.
- Dependent launches, plain and programmatic: what one launch of a chain costs.

Each row is the time of one call out of many in a CUDA graph, and its SQNR to the first alternative.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness.cli import run_benchmark
from bench.harness.summary import table
from engines.backends.cuda.graphs import CudaGraphCapture, GraphCapture
from engines.backends.cuda.layers import LinearLayer
from engines.backends.cuda.mlp_weights import MlpWeight
from engines.kernels import linear_attention
from engines.kernels.cache_keys import stable_cache_keys
from engines.kernels.e4m3 import FP8, power_of_two_scales, quantised
from engines.kernels.linear_attention import LINEAR_ATTENTION
from engines.kernels.op import Launcher, Ops, sqnr_db
from engines.kernels.scaled_product import SCALED_PRODUCT
from engines.kernels.silu_product import SILU_PRODUCT
from engines.kernels.text.skinny_product import GATED_PRODUCT, SKINNY_PRODUCT
from engines.pipeline.download import CudaDownloader, jpeg_on_card
from engines.types import Job

LARGEST = 4.0  # of inputs drawn from a normal distribution
CONTEXTS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Alternative:
    """One way to compute `what`."""

    what: str
    how: str
    run: Callable[[], Tensor]
    captured: bool = True  # False: timed from the host, as it waits for the device


class _Drawn:
    """Seeded random tensors in bf16, drawn on the host and moved to a device."""

    def __init__(self, device: torch.device):
        self._device, self._generator = device, torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        made = torch.randn(*shape, generator=self._generator) * scale
        return made.to(torch.bfloat16).to(self._device)


def products(ops: Ops, draw: _Drawn, tokens: int, width: int) -> Iterator[Alternative]:
    """Yields the products of a block of `width` with `tokens` rows."""
    hidden = width * 5 // 2
    shapes = {"qkv": (3 * width, width), "query": (width, width), "project": (width, hidden)}
    for name, (out, depth) in shapes.items():
        what, x = f"{name} {tokens}x{depth}x{out}", draw(tokens, depth)
        wide = LinearLayer(draw(out, depth, scale=depth**-0.5), None)
        narrow = wide.to_fp8(LARGEST)
        yield Alternative(what, "bf16", _bound(F.linear, x, wide.weight))
        yield Alternative(what, "e4m3", _bound(ops, SCALED_PRODUCT, *_operands(x, narrow)))
    x, layer = draw(tokens, width), LinearLayer(draw(2 * hidden, width, scale=width**-0.5), draw(2 * hidden))
    what, narrow = f"expand + SiLU {tokens}x{width}x{2 * hidden}", layer.to_fp8(LARGEST)
    x8, weight, bias, *scales = _operands(x, narrow)
    yield Alternative(what, "bf16, one kernel", _bound(ops, SILU_PRODUCT, x, layer.weight, layer.bias))
    yield Alternative(what, "e4m3, one kernel", _bound(ops, SILU_PRODUCT, x8, weight, bias, *scales))
    yield Alternative(what, "e4m3, cuBLAS and SiLU", lambda: F.silu(ops(SCALED_PRODUCT, x8, weight, bias, *scales)))


def text_products(ops: Ops, draw: _Drawn, rows: int, width: int, mlp: int) -> Iterator[Alternative]:
    """Yields both products of an MLP with `rows` tokens, whose weights bound the time."""
    x, hidden = draw(rows, width), draw(rows, mlp)
    for what, op, given, weight, more in (
        ("gate and up", GATED_PRODUCT, x, draw(2 * mlp, width, scale=width**-0.5), (None,)),
        ("down", SKINNY_PRODUCT, hidden, draw(width, mlp, scale=mlp**-0.5), ()),
    ):
        scale = power_of_two_scales(weight)
        narrow = (weight.float() / scale[:, None]).to(FP8)
        yield Alternative(f"{what}, {rows} rows", "bf16", _bound(ops, op, given, weight, *more))
        yield Alternative(f"{what}, {rows} rows", "e4m3 weights", _bound(ops, op, given, narrow, *more, scale))


def widened_products(ops: Ops, draw: _Drawn, rows: int, width: int, mlp: int) -> Iterator[Alternative]:
    """Yields gate and up of an MLP for more rows than the kernels for few rows take."""
    what, x, weight = f"gate and up, {rows} rows", draw(rows, width), draw(2 * mlp, width, scale=width**-0.5)
    narrow = MlpWeight(weight).narrowed()
    yield Alternative(what, "bf16", _bound(F.linear, x, weight))
    yield Alternative(what, "e4m3, widened first", lambda: F.linear(x, narrow.wide(ops, x.dtype)))


def attention(ops: Ops, draw: _Drawn, tokens: int, width: int) -> Iterator[Alternative]:
    """Yields the linear attention with other numbers of contexts a load."""
    qkv, weight = draw(tokens, 3 * width), torch.ones(width, device=draw(1).device)
    for count in sorted(CONTEXTS, key=lambda count: count != linear_attention._CONTEXTS_PER_LOAD):

        def run(count: int = count) -> Tensor:
            with patch.object(linear_attention, "_CONTEXTS_PER_LOAD", count):
                output: Tensor = ops(LINEAR_ATTENTION, qkv, weight, 1, 32, 1e-5)
                return output

        yield Alternative(f"linear attention {tokens}x{width}", f"{count} contexts a load", run)


def files(device: torch.device) -> Iterator[Alternative]:
    """Yields the ways of an image of 1024x1024 from a GPU to the host: pixels, and nvJPEG's file where it is there."""
    downloader, job = CudaDownloader(jpeg_on_card()), Job("", 0, 1024, 1024)
    noise = torch.randint(256, (1024, 1024, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ramp = (torch.arange(1024)[:, None, None] // 4).to(torch.uint8).expand(1024, 1024, 3).contiguous()
    for name, pixels in (("noise", noise.to(device)), ("a ramp", ramp.to(device))):
        output = {"pixels": pixels, "finite": torch.ones((), dtype=torch.bool, device=device)}

        def fetched(job: Job, output: dict[str, Tensor] = output) -> Tensor:
            image = downloader.start(output, job).wait()
            if image.file is None:
                return torch.from_numpy(image.pixels)
            return torch.frombuffer(bytearray(image.file), dtype=torch.uint8)

        yield Alternative(f"{name}, pixels to the host", "a copy", _bound(fetched, job), captured=False)
        if downloader.jpeg is not None:
            jpeg = replace(job, jpeg_quality=90)
            yield Alternative(f"{name}, JPEG to the host", "nvJPEG", _bound(fetched, jpeg), captured=False)


def launches(draw: _Drawn) -> Iterator[Alternative]:
    """Yields a chain of ten dependent kernels, plain and programmatic (both wait for the kernel before them)."""
    from bench.acceptance.kit.dependent_launch import add_one

    x = draw(1024)
    for how, programmatic in (("plain", False), ("programmatic", True)):

        def run(programmatic: bool = programmatic) -> Tensor:
            y = x.clone()
            for _ in range(10):
                add_one[(1,)](y, size=1024, programmatic=programmatic, launch_pdl=programmatic, num_warps=4)
            return y

        yield Alternative("ten dependent launches", how, run)


def _operands(x: Tensor, layer: LinearLayer) -> tuple[Any, ...]:
    assert layer.input_scale is not None
    assert layer.scales is not None
    return quantised(x.float(), layer.input_scale), layer.weight, layer.bias, *layer.scales


def _bound(function: Callable[..., Any], *args: Any) -> Callable[[], Tensor]:
    def run() -> Tensor:
        output: Tensor = function(*args)
        return output

    return run


def timed(run: Callable[[], Tensor], calls: int, recorder: GraphCapture | None) -> float:
    """Returns the milliseconds of one of `calls` calls. recorder: in one graph of a GPU, without the host's work."""
    if recorder is None:
        began = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - began) * 1e3 / calls

    def launch() -> tuple[Tensor, ...]:
        for _ in range(calls - 1):
            run()
        return (run(),)

    recorder.warm(run)
    replay, _ = recorder.record(launch)
    event: Any = torch.cuda.Event  # untyped in torch's stubs
    best = float("inf")
    for _ in range(5):
        start, end = (event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(end) / calls)
    return best


@torch.inference_mode()
def compare(device: torch.device, *, full: bool, calls: int) -> dict[str, Any]:
    """Returns a row for each alternative. full: published widths; otherwise small ones, by references without a GPU."""
    stable_cache_keys()  # finds the kernels that the kit compiled beside each other
    ops = Ops(Launcher.of(device) if device.type == "cuda" else None)
    draw, cases = _Drawn(device), list[Alternative]()
    tokens, widths = (1024, (1152, 2240)) if full else (16, (32,))
    for width in widths:
        cases += [*products(ops, draw, tokens, width), *attention(ops, draw, tokens, width)]
    for few in (32, 64) if full else (4,):
        cases += text_products(ops, draw, few, *((2304, 9216) if full else (48, 96)))
    for many in (128, 256) if full else (72,):
        cases += widened_products(ops, draw, many, *((2304, 9216) if full else (48, 96)))
    recorder = CudaGraphCapture() if device.type == "cuda" else None
    if recorder is not None:
        cases += [*launches(draw), *files(device)]
    rows, expected = list[dict[str, Any]](), dict[str, Tensor]()
    for case in cases:
        row: dict[str, Any] = {"what": case.what, "how": case.how}
        rows.append(row)
        try:
            found = case.run()
            found = found.sum(0) if found.dim() == 3 and found.is_floating_point() else found  # parts of a sum
            row["sqnr_db"] = round(sqnr_db(expected.setdefault(case.what, found), found), 1)
            row["ms"] = round(timed(case.run, calls, recorder if case.captured else None), 5)
        except Exception as error:  # a compiler or driver may raise anything; the other rows are worth keeping
            row["error"] = f"{type(error).__name__}: {error}"[:200]
        print(json.dumps(row), flush=True)  # a time limit may end the program
    return {"rows": rows}


def show(found: dict[str, Any]) -> str:
    rows = [[row["what"], row["how"], row.get("ms"), row.get("sqnr_db"), row.get("error", "")] for row in found["rows"]]
    return table(("what", "how", "ms", "SQNR, dB", "error"), rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.acceptance.kit.alternatives",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--calls", type=int, default=50, help="in one graph (default 50)")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    return run_benchmark(lambda: compare(device, full=device.type == "cuda", calls=options.calls), show)


if __name__ == "__main__":
    sys.exit(main())
