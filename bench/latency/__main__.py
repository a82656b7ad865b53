"""Measures seconds from prompts to pixels, by stage, of our engine and of another on the same weights.

    python -m bench.latency --model random:sprint-0.6b --size 512 --steps 1 --batch 1 --vs diffusers --runs 5
    python -m bench.latency --model models/tiny --backend compiled --precision fp32 --vs diffusers-compiled --http
    python -m bench.latency --model random:sprint-0.6b --size 512 --vs openvino-static    # after make openvino

The two run in turn, optimum-intel's OVSanaSprintPipeline in a process of its own. Every run has new prompts of about
--tokens tokens, so no cache of embeddings helps. The tables also show the distance of both from an fp32 reference on
equally rounded weights, and from each other. `ratio` is their median over ours, end to end. Prints tables, then one
JSON document as the last line.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from bench.harness.cli import BenchmarkParser, parse_size, run_benchmark
from bench.harness.pipelines import DTYPES, Baseline
from bench.latency.comparison import measure, show
from bench.latency.openvino_pipeline import PYTHON


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = BenchmarkParser("bench.latency", __doc__)
    parser.add_argument("--model", required=True, help="folder, hub id, or random:<name> for random weights")
    parser.add_argument("--decoder", help="another decoder of the same latents: lite, taesana, a folder or a hub id")
    parser.add_argument("--size", type=parse_size, help="N or WxH in pixels (default: the checkpoint's)")
    parser.add_argument("--steps", type=int, default=1, choices=(1, 2, 3, 4))
    parser.add_argument("--batch", type=int, default=1, help="images at once (default 1)")
    parser.add_argument("--max-batch", type=int, help="what our engine is loaded for (default: --batch)")
    parser.add_argument("--runs", type=int, default=5, help="of each (default 5), after one warm-up")
    parser.add_argument("--tokens", type=int, default=20, help="length of the prompts (default 20)")
    parser.add_argument("--backend", default="auto", help="of our engine")
    parser.add_argument("--engine", help="built engines for ours (python build_engine.py)")
    parser.add_argument("--precision", default="bf16", help="of our engine (default bf16)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--vs", choices=get_args(Baseline), help="what ours is measured against")
    parser.add_argument("--vs-precision", choices=tuple(DTYPES), help="of that (default: --precision, or else bf16)")
    parser.add_argument("--vs-python", type=Path, default=PYTHON, help=f"with optimum-intel (default: {PYTHON})")
    parser.add_argument("--no-reference", dest="reference", action="store_false", help="no fp32 images to compare with")
    parser.add_argument("--memory", action="store_true", help="peak memory of each, in processes of their own")
    parser.add_argument("--http", action="store_true", help="ours through python -m server too")
    options = parser.options(argv)
    if min(options.batch, options.runs, options.tokens) < 1:
        parser.error("--batch, --runs and --tokens: needed is 1 at least")
    options.vs_precision = options.vs_precision or (options.precision if options.precision in DTYPES else "bf16")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parsed(argv)
    return run_benchmark(lambda: measure(options), show)


if __name__ == "__main__":
    sys.exit(main())
