"""Measures fp8 on a checkpoint: the judge's score beside fp32's, and the error of each layer quantised by itself.

    python -m bench.quality.fp8 --model tiny --prompts 500 --seeds 3
    python -m bench.quality.fp8 --model sprint-0.6b --no-score --images 4

fp8 is engines.build.quantization's (E4M3, scales from real prompts), computed by rounding in PyTorch. Everything else
stays in fp32, on any device. The score is the tiny world's (distill.evaluation.scores). Sensitivity is the SQNR of the
decoded image with one quantised layer, against fp32. Prints tables, then one JSON document as the last line. Exit code
1: the score differs from fp32's by more than --allowed.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bench.harness.cli import BenchmarkParser, run_benchmark
from bench.harness.host import host_facts
from bench.harness.summary import table
from distill.evaluation.scores import engine_generator, evaluate, evaluation_prompts
from engines.build.quantization import quantised_layers, quantize, rule_for, run_calibration, sensitivity
from engines.checkpoints.checkpoint import Checkpoint, open_checkpoint
from engines.loader import load_engine
from engines.models.pixels import PixelDecoder
from engines.models.transformer import SprintTransformer
from engines.pipeline.calibration import CalibrationPrompts, calibration_prompts

CPU = torch.device("cpu")


class Fp8Checkpoint(Checkpoint):
    """A checkpoint whose transformer is in fp8, calibrated for one step at its default size."""

    def load_transformer(self, dtype: torch.dtype, device: torch.device) -> SprintTransformer:
        module = quantize(
            super().load_transformer(dtype, device),
            calibration_prompts(self),
            [_latent_size(self)],
            (1,),
            self.transformer.in_channels,
        )
        assert isinstance(module, SprintTransformer)
        return module


def measure(options: argparse.Namespace) -> dict[str, Any]:
    checkpoint = open_checkpoint(options.model)
    result: dict[str, Any] = {
        "program": "bench.quality.fp8",
        "command": options.command,
        "model": options.model,
        "weights": checkpoint.weights.sha256()[:12],
        "device": "cpu",
        "machine": host_facts(),
        "sensitivity": layer_sensitivity(checkpoint, options.images),
    }
    if options.score:
        result["score"] = {
            "prompts": options.prompts,
            "seeds": options.seeds,
            "steps": options.steps,
            "allowed": options.allowed,
            "fp32": _score(checkpoint, options),
            "fp8": _score(Fp8Checkpoint(**vars(checkpoint)), options),
        }
        scores = result["score"]
        scores["apart"] = round(scores["fp8"]["mean"] - scores["fp32"]["mean"], 4)
    return result


def layer_sensitivity(checkpoint: Checkpoint, image_count: int) -> dict[str, Any]:
    """Returns the SQNR of decoded images in dB: of all quantised layers together, and of each, worst first."""
    side, channels = _latent_size(checkpoint), checkpoint.transformer.in_channels
    texts = calibration_prompts(checkpoint)
    chosen = texts.rows(image_count)
    decoder = PixelDecoder(checkpoint.load_autoencoder(torch.float32, CPU))

    def decoded(module: nn.Module) -> Tensor:
        """[P, 3, H, W] before it is rounded to bytes."""
        latents = run_calibration(module, CalibrationPrompts(chosen.states, chosen.mask), [side], (1,), channels)
        return torch.cat([decoder.decoder(latent / decoder.scaling_factor) for latent in latents])

    module: nn.Module = checkpoint.load_transformer(torch.float32, CPU)
    with torch.inference_mode():
        reference = decoded(module)
    module = quantize(module, texts, [side], (1,), channels)
    per_layer = sensitivity(module, decoded, reference)
    with torch.inference_mode():
        power, noise = reference.square().mean(), (decoded(module) - reference).square().mean()
    together = 10 * float((power / noise).log10())
    return {
        "pictures": image_count,
        "together_db": round(together, 2),
        "layers": {name: round(value, 2) for name, value in per_layer.items()},
        "kept_out": sorted({rule_for(name).pattern for name in _all_layers(module)} - _patterns(module)),
    }


def _all_layers(module: nn.Module) -> list[str]:
    return [name for name, part in module.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)]


def _patterns(module: nn.Module) -> set[str]:
    return {rule_for(name).pattern for name in quantised_layers(module)}


def _score(checkpoint: Checkpoint, options: argparse.Namespace) -> dict[str, Any]:
    engine = load_engine(checkpoint, backend="eager", precision="fp32", device="cpu", max_batch=8)
    generate = engine_generator(engine, options.steps, 4.5)
    report = evaluate(generate, evaluation_prompts(options.prompts), range(options.seeds))
    engine.close()
    return {"mean": report.mean, "spread": report.spread, "categories": report.categories}


def _latent_size(checkpoint: Checkpoint) -> tuple[int, int]:
    width, height = checkpoint.settings.default_size
    unit = checkpoint.autoencoder.compression
    return height // unit, width // unit


def show(result: dict[str, Any]) -> str:
    """Returns the tables for people."""
    sensitivities = result["sensitivity"]
    parts = [f"`{result['model']}` (weights {result['weights']})."]
    if "score" in result:
        score = result["score"]
        rows = [
            [name, score[name]["mean"], score[name]["spread"], *score[name]["categories"].values()]
            for name in ("fp32", "fp8")
        ]
        parts += [
            f"The judge's score of {score['prompts']} held-out captions, {score['seeds']} seeds, {score['steps']} "
            f"step(s): fp8 is {score['apart']:+.4f} from fp32, allowed is {score['allowed']}.",
            table(("precision", "mean", "std over seeds", *score["fp32"]["categories"]), rows),
        ]
    parts += [
        f"SQNR of {sensitivities['pictures']} decoded images against fp32: {sensitivities['together_db']} dB with "
        "every layer of the table in fp8; with one layer alone, worst first:",
        table(("layer", "SQNR, dB"), [[f"`{name}`", value] for name, value in sensitivities["layers"].items()]),
        f"Not quantised, by the table: {', '.join(f'`{pattern}`' for pattern in sensitivities['kept_out'])}.",
    ]
    return "\n\n".join(parts)


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = BenchmarkParser("bench.quality.fp8", __doc__)
    parser.add_argument("--model", default="tiny", help="folder, hub id, or random:<name> (default tiny)")
    parser.add_argument("--prompts", type=int, default=500, help="held-out captions to judge (default 500)")
    parser.add_argument("--seeds", type=int, default=3, help="images of each caption (default 3)")
    parser.add_argument("--steps", type=int, default=1, choices=(1, 2, 3, 4))
    parser.add_argument("--allowed", type=float, default=0.02, help="distance of the scores (default 0.02)")
    parser.add_argument("--no-score", dest="score", action="store_false", help="sensitivity alone")
    parser.add_argument("--images", type=int, default=4, help="that sensitivity is measured on (default 4)")
    options = parser.options(argv)
    if min(options.prompts, options.seeds, options.images) < 1:
        parser.error("--prompts, --seeds and --images: needed is 1 at least")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parsed(argv)
    return run_benchmark(
        lambda: measure(options), show, lambda result: options.score and abs(result["score"]["apart"]) > options.allowed
    )


if __name__ == "__main__":
    sys.exit(main())
