"""Times the stages in bf16 and in fp8 with the same jobs, and measures how far their images are apart.

    python -m bench.acceptance.kit.precisions --model random:sprint-0.6b

One engine after the other, so that both fit the card's memory.
"""

import argparse
import gc
import json
import sys
from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch

from bench.acceptance.over_http.client import fresh_prompts
from bench.harness.cli import comma_separated, run_benchmark
from bench.harness.pipelines import EnginePipeline, TimedImages, Workload
from bench.harness.summary import percentiles, table
from engines.backends.parity import difference
from engines.checkpoints.checkpoint import open_checkpoint

STAGES = ("text", "denoise", "decode", "total")


def compare(model: str, device: str, precisions: Sequence[str], batches: Sequence[int], runs: int) -> dict[str, Any]:
    """Returns milliseconds by stage of each precision and batch, and PSNR of images to those of the first precision.

    One run is not counted. Prompts have 20 tokens: one alone goes through the text encoder's kernels for few rows.
    """
    checkpoint = open_checkpoint(model)
    width, height = checkpoint.settings.default_size
    rows: list[dict[str, Any]] = []
    exact: dict[int, TimedImages] = {}
    for precision in precisions:
        engine = EnginePipeline(checkpoint, device=device, precision=precision, max_batch=max(batches))
        texts = fresh_prompts(checkpoint, 20)  # the same for each precision
        for batch in batches:
            made = [
                engine.run(Workload(list(islice(texts, batch)), list(range(batch)), width, height, 1))
                for _ in range(runs + 1)
            ]
            row: dict[str, Any] = {"precision": precision, "batch": batch, "kernels": _kernels(engine)}
            row |= {stage: percentiles([one.seconds[stage] * 1e3 for one in made[1:]]) for stage in STAGES}
            reference = exact.setdefault(batch, made[0])
            found = difference(_stack(reference), _stack(made[0]))
            rows.append(row | {"psnr_db": found.psnr_db, "max_abs": found.max_abs})
            print(json.dumps(rows[-1]), flush=True)  # a time limit may end the program
        del engine
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return {"rows": rows}


def _stack(made: TimedImages) -> torch.Tensor:
    return torch.stack([torch.tensor(image) for image in made.images])


def _kernels(engine: EnginePipeline) -> object:
    """Returns which kernels their references replace."""
    reasons = engine.facts["reasons"]
    return reasons.get("kernels") if isinstance(reasons, dict) else None


def show(found: dict[str, Any]) -> str:
    rows = [
        [row["precision"], row["batch"], *(row[stage]["p50"] for stage in STAGES), row["psnr_db"], row["kernels"]]
        for row in found["rows"]
    ]
    return table(("precision", "batch", *(f"{stage}, ms" for stage in STAGES), "PSNR, dB", "kernels"), rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.acceptance.kit.precisions", description=__doc__)
    parser.add_argument("--model", required=True, help="folder, hub id or random:<name>")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--precisions", type=comma_separated, default=("bf16", "fp8"), help="default bf16,fp8")
    parser.add_argument("--batches", type=comma_separated, default=("1", "8"), help="default 1,8")
    parser.add_argument("--runs", type=int, default=15, help="of each precision and batch (default 15)")
    options = parser.parse_args(argv)
    batches = [int(batch) for batch in options.batches]
    return run_benchmark(
        lambda: compare(options.model, options.device, options.precisions, batches, options.runs), show
    )


if __name__ == "__main__":
    sys.exit(main())
