"""Writes a ControlNet of upstream's size with seeded random weights, because none is published for Sprint.

python -m bench.acceptance.kit.controlnet --model random:sprint-0.6b --out DIR
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bench.harness.cli import run_benchmark
from engines.checkpoints.checkpoint import open_checkpoint
from engines.checkpoints.random_weights import RandomWeights
from engines.checkpoints.weights import meta_init
from engines.models.controlnet import ControlConfig, ControlNet

COPIES = 7  # blocks, upstream's default


def write(model: str, out: Path) -> dict[str, Any]:
    """Writes config.json and bf16 weights, of at most all blocks but one. Returns the numbers of blocks and parameters.

    Raises CheckpointError.
    """
    transformer = open_checkpoint(model).transformer
    config = ControlConfig(replace(transformer, num_layers=min(COPIES, transformer.num_layers - 1)))
    with meta_init():
        module = ControlNet(config)
    RandomWeights().load_into("controlnet", module, torch.bfloat16, torch.device("cpu"))
    out.mkdir(parents=True, exist_ok=True)
    save_file(module.state_dict(), out / "diffusion_pytorch_model.safetensors")
    (out / "config.json").write_text(json.dumps(config.to_dict()) + "\n", encoding="utf-8")
    return {"blocks": config.copies.num_layers, "parameters": sum(one.numel() for one in module.state_dict().values())}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.acceptance.kit.controlnet", description=__doc__)
    parser.add_argument("--model", required=True, help="whose transformer it is for")
    parser.add_argument("--out", type=Path, required=True, help="folder that is filled")
    options = parser.parse_args(argv)
    return run_benchmark(
        lambda: write(options.model, options.out),
        lambda found: f"{found['blocks']} blocks, {found['parameters'] / 1e6:.0f} million parameters",
    )


if __name__ == "__main__":
    sys.exit(main())
