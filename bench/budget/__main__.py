"""Counts the cost of a request on a GPU, on a machine without one.

    python -m bench.budget --model random:sprint-0.6b --size 1024 --steps 1 --batch 1 --backend cuda-graph --tokens 20

Loads the engine, captures its graphs and requests images on a simulated card (bench.budget.card): everything runs but
the kernels. It counts one batch of new prompts. cuda-graph: our kernels. tensorrt: each built engine is one launch, as
fast as its products at stated shares of a peak; the rest counts as built. Not counted: launches within one library call
(cuBLAS sometimes clears a workspace), workspaces, the CUDA context's memory, image files, queue and HTTP.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from bench.budget.engine import BACKENDS, count_request
from bench.budget.totals import document, show
from bench.harness.cli import parse_size, run_benchmark


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.budget", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="random:sprint-0.6b", help="folder, hub id or random:<name>")
    parser.add_argument("--decoder", help="another decoder of the same latents: lite, taesana, a folder or a hub id")
    parser.add_argument("--size", type=parse_size, default=(1024, 1024), help="N or WxH in pixels (default 1024)")
    parser.add_argument("--steps", type=int, default=1, choices=(1, 2, 3, 4))
    parser.add_argument("--batch", type=int, default=1, choices=range(1, 9), help="images at once (default 1)")
    parser.add_argument("--backend", default="cuda-graph", choices=BACKENDS)
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp8"), help="of cuda-graph (default bf16)")
    parser.add_argument("--tokens", type=int, default=20, help="of a prompt (default 20)")
    parser.add_argument(
        "--png", action="store_true", help="with PNG files made on the card, not pixels brought from it"
    )
    options = parser.parse_args(argv)
    width, height = options.size
    about = (
        f"{options.model}, {width}x{height}, {options.steps} steps, batch {options.batch}, {options.tokens} tokens, "
        f"{options.backend}, {options.precision}{', PNG' if options.png else ''}"
    )
    tables = []

    def measured() -> dict[str, Any]:
        counted = count_request(
            options.model,
            options.backend,
            options.size,
            options.steps,
            options.batch,
            options.tokens,
            options.decoder,
            options.precision,
            png=options.png,
        )
        found = document(counted)
        tables.append(show(counted, found, about))
        return found

    return run_benchmark(measured, lambda _: tables[-1])


if __name__ == "__main__":
    sys.exit(main())
