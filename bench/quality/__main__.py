"""Scores and times each way to run a checkpoint on held-out captions.

    python -m bench.quality --model models/tiny --variants eager:fp32,eager:bf16,eager:int8,emulated:fp8 --steps 1,2,4
    python -m bench.quality --model models/tiny --variants eager:fp32,engine:artifacts/cpu,diffusers:fp32

A variant is <backend>:<precision>, engine:<folder of build_engine.py>, diffusers:<precision>, or emulated:<fp8|fp16>,
which rounds in PyTorch as a GPU would; emulated:native-fp8 is what --precision fp8 serves on a GPU without built
engines. +<folder or hub id> behind it selects another decoder. All variants get the same
captions and seeds. The tiny world's judge scores them in GenEval's six categories. Each score has its difference from
the first variant's on the same prompts, with a 95 % interval (bootstrap over prompts). Latency is of one image, in turn
with the first variant. bench.quality.images makes the images of a prompt set, bench.quality.metrics computes FID and
CLIP score. Prints tables, then one JSON document as the last line.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from bench.harness.cli import BenchmarkParser, comma_list, run_benchmark
from bench.quality.scores import measure, show
from bench.quality.variants import Variant
from engines.sampler import Schedule

SCHEDULES = get_args(Schedule)


def _variants(text: str) -> list[Variant]:
    try:
        return [Variant.parse(part) for part in text.split(",")]
    except ValueError as error:
        message = f"got {error}, needed is <backend>:<precision>, or engine:, diffusers: or emulated: with its argument"
        raise argparse.ArgumentTypeError(message) from error


def main(argv: Sequence[str] | None = None) -> int:
    parser = BenchmarkParser("bench.quality", __doc__)
    parser.add_argument("--model", required=True, help="checkpoint folder or hub id; it must draw the tiny world")
    parser.add_argument("--variants", type=_variants, default="eager:fp32,eager:bf16", help="separated by commas")
    parser.add_argument(
        "--steps", type=comma_list(int, (1, 2, 3, 4)), default="1,2,4", help="separated by commas (default 1,2,4)"
    )
    parser.add_argument("--prompts", type=int, default=120, help="held-out captions (default 120)")
    parser.add_argument("--seeds", type=int, default=1, help="images for each caption (default 1)")
    parser.add_argument("--guidance", type=float, default=4.5, help="guidance scale (default 4.5)")
    parser.add_argument("--size", type=int, help="side of the images in pixels (default: the checkpoint's)")
    parser.add_argument(
        "--schedule", type=comma_list(str, SCHEDULES), default="paper", help=f"of {', '.join(SCHEDULES)}"
    )
    parser.add_argument("--latency-runs", type=int, default=10, help="images timed for each row (default 10, 0: none)")
    parser.add_argument("--worst", type=Path, help="write the worst images of each variant to this file (.webp, .png)")
    parser.add_argument("--keep", type=Path, help="keep the images of each finished row here; stopped, it continues")
    parser.add_argument("--max-batch", type=int, default=8)
    options = parser.options(argv)
    return run_benchmark(lambda: measure(options), show)


if __name__ == "__main__":
    sys.exit(main())
