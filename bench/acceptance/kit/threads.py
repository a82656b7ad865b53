"""Times the same batches with one thread of torch and with one for each core.

    python -m bench.acceptance.kit.threads --model random:sprint-0.6b

An engine on a GPU uses one thread: waking a pool for a batch's noise took longer than the pool saved.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch

from bench.acceptance.over_http.client import fresh_prompts
from bench.harness.cli import run_benchmark
from bench.harness.pipelines import EnginePipeline, Workload
from bench.harness.summary import percentiles, table
from engines.checkpoints.checkpoint import open_checkpoint

CASES = ((1, 1), (1, 2), (8, 1))  # batch, steps


def compare(model: str, device: str, runs: int, rounds: int) -> dict[str, Any]:
    """Returns milliseconds by stage for each case and thread count: `runs` runs after one uncounted.

    Thread counts alternate for `rounds` rounds, because a card grows warm.
    """
    checkpoint = open_checkpoint(model)
    engine = EnginePipeline(checkpoint, device=device, precision="bf16" if device == "cuda" else "fp32", max_batch=8)
    width, height = checkpoint.settings.default_size
    prompts, counts = fresh_prompts(checkpoint, 20), (1, os.cpu_count() or 1)
    seconds: dict[tuple[int, int, int], list[dict[str, float]]] = {}
    for batch, steps in CASES:
        for _ in range(rounds):
            for threads in counts:
                torch.set_num_threads(threads)
                made = [
                    engine.run(Workload(list(islice(prompts, batch)), list(range(batch)), width, height, steps)).seconds
                    for _ in range(runs + 1)
                ]
                seconds.setdefault((batch, steps, threads), []).extend(made[1:])
    rows = [
        {"batch": batch, "steps": steps, "threads": threads}
        | {stage: percentiles([one[stage] * 1e3 for one in made]) for stage in made[0]}
        for (batch, steps, threads), made in seconds.items()
    ]
    return {"rows": rows}


def show(found: dict[str, Any]) -> str:
    stages = ("text", "denoise", "decode", "total")
    rows = [
        [*(row[key] for key in ("batch", "steps", "threads")), *(row[stage]["p50"] for stage in stages)]
        for row in found["rows"]
    ]
    return table(("batch", "steps", "threads", *(f"{stage}, ms" for stage in stages)), rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.acceptance.kit.threads", description=__doc__)
    parser.add_argument("--model", required=True, help="folder, hub id or random:<name>")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--runs", type=int, default=5, help="of each case in a round (default 5)")
    parser.add_argument("--rounds", type=int, default=3, help="default 3")
    options = parser.parse_args(argv)
    return run_benchmark(lambda: compare(options.model, options.device, options.runs, options.rounds), show)


if __name__ == "__main__":
    sys.exit(main())
