"""Proves and measures on a GPU host, in one run, all that needs a GPU.

    make accept-gpu                       # the tiny checkpoint, and random weights at the published size
    make accept-gpu MODEL=sprint-0.6b     # the tiny checkpoint, and a published one: a hub id or a folder
    python -m bench.acceptance --device cpu --models tiny --batches 1,2 --runs 1 --peers diffusers

For each checkpoint it measures ranges of activations and builds engines in each precision with their parity gates. It
compares images with a second run and with eager fp32, and captures graphs. It then takes seconds by stage for every
number of steps and batch, with diffusers on the same device for comparison. It writes <out>/<date>_<device>.json and
.md after every step; they hold measured figures alone. Exit code 1: a step failed.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.acceptance.plan import AcceptanceConfig, StepResult
from bench.acceptance.report import show
from bench.acceptance.steps import accept
from bench.harness.cli import comma_separated, command, parse_size, run_benchmark
from bench.harness.errors import BenchError
from bench.harness.host import host_facts
from bench.roofline.published import PAPER
from engines.checkpoints.checkpoint import open_checkpoint
from engines.device.hardware import capability_text, this_machine

ROOT = Path(__file__).resolve().parents[2]

MODELS = ("tiny", "random:sprint-0.6b")

PRECISIONS = {"cuda": ("fp16", "fp8"), "cpu": ("fp32", "bf16")}

BACKENDS = {"cuda": ("cuda-graph", "compiled", "torch-tensorrt"), "cpu": ("eager",)}

PEERS = ("diffusers", "diffusers-compiled")


def run(options: argparse.Namespace, keep: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """Runs all steps of all models and returns their document.

    After each step it prints a line on standard error and passes the document so far to `keep`. Raises SprintError for
    a checkpoint that it cannot open, BenchError for an unknown step in `--only`.
    """
    device = torch.device(options.device)
    found, steps = _about(options, device), list[StepResult]()

    def tell(step: StepResult) -> None:
        print(_line(step), file=sys.stderr, flush=True)
        steps.append(step)
        found["steps"] = [one.to_dict() for one in steps]
        found["failed"] = sum(one.outcome == "failed" for one in steps)
        keep(found)

    for model in options.models:
        size = options.size or open_checkpoint(model).settings.default_size
        plan = AcceptanceConfig(
            model=model,
            device=device,
            engines=options.engines,
            precisions=options.precisions or PRECISIONS[device.type],
            size=size,
            batches=options.batches,
            steps=options.steps,
            runs=options.runs,
            backends=BACKENDS[device.type],
            peers=options.peers,
            only=options.only,
        )
        accept(plan, tell)
    unknown = set(options.only) - {step.name for step in steps}
    if unknown:
        raise BenchError(f"--only: no step is called {', '.join(sorted(unknown))}")
    return found


def _about(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    here = this_machine()
    return {
        "program": "bench.acceptance",
        "command": options.command,
        "device": str(device),
        "card": here.gpu if device.type == "cuda" else here.cpu,
        "compute_capability": capability_text(here.capability) if device.type == "cuda" else None,
        "driver": here.driver,
        "machine": host_facts(),
        "failed": 0,
        "steps": [],
        "paper": [
            {"device": name, "stage": stage, "steps": steps, "milliseconds": value}
            for (name, stage), by_steps in PAPER.items()
            for steps, value in by_steps.items()
        ],
    }


def _line(step: StepResult) -> str:
    return f"{step.outcome}: {step.model}: {step.name}, {step.seconds:.0f} s" + (
        f": {step.reason}" if step.reason else ""
    )


def numbers(text: str) -> tuple[int, ...]:
    return tuple(sorted({int(number) for number in text.split(",")}))


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.acceptance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--models", type=comma_separated, default=MODELS, help="folders, hub ids, random:<name>; with commas"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--precisions", type=comma_separated, default=(), help="of built engines; default fp16,fp8 on a GPU"
    )
    parser.add_argument("--size", type=parse_size, help="N or WxH in pixels (default: each checkpoint's)")
    parser.add_argument("--batches", type=numbers, default=(1, 2, 4, 8, 16))
    parser.add_argument("--steps", type=numbers, default=(1, 2, 4))
    parser.add_argument("--runs", type=int, default=10, help="of each measurement, after one more")
    parser.add_argument(
        "--peers", type=comma_separated, default=PEERS, help="among diffusers,diffusers-compiled; '' for none"
    )
    parser.add_argument(
        "--only", type=comma_separated, default=(), help="names of steps, as 'latency cuda-graph'; default all"
    )
    parser.add_argument("--engines", type=Path, default=ROOT / "build" / "accept", help="folder for built engines")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder for the results")
    given = sys.argv[1:] if argv is None else argv
    parser.set_defaults(command=command("bench.acceptance", given))
    options = parser.parse_args(given)
    if options.runs < 1:
        parser.error("--runs: needed is 1 at least")
    if set(options.peers) - set(PEERS):
        parser.error(f"--peers: got {','.join(options.peers)}, allowed {','.join(PEERS)}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parsed(argv)

    def kept() -> dict[str, Any]:
        if options.device == "cuda" and not torch.cuda.is_available():
            raise BenchError("device: torch sees no GPU; --device cpu runs what a CPU can")
        return run(options, lambda so_far: keep(so_far, options.out))

    return run_benchmark(kept, show, lambda found: found["failed"] > 0)


def keep(found: dict[str, Any], folder: Path) -> None:
    """Writes the document and its page into `folder`; day and card name the files."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", found["card"]).strip("-").lower()
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"{found['machine']['date']}_{name}"
    stem.with_suffix(".json").write_text(json.dumps(found) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(show(found), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
