"""What fp8 costs a checkpoint's pictures: the judge's score beside fp32's, and the error that each layer causes alone.

    python -m bench.quality.fp8 --model tiny --prompts 500 --seeds 3
    python -m bench.quality.fp8 --model sprint-0.6b --no-score --pictures 4

fp8 is that of engines.build.quantization (E4M3, scales from real prompts), computed by rounding in PyTorch; everything
else stays in fp32, on any device. The score is of the tiny world (distill.evaluation.scores). Sensitivity: SQNR of the
decoded picture when one layer alone is quantised, against fp32. Prints tables, then one JSON document as the last line.
Exit code 1: the score is further than --allowed from fp32's.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bench.harness.cli import command, told
from bench.harness.host import machine
from bench.harness.summary import table
from distill.evaluation.scores import engine_generator, evaluate, evaluation_prompts
from engines.build.quantization import decide, quantised_layers, quantize, run_samples, sensitivity
from engines.checkpoints.checkpoint import Checkpoint, open_checkpoint
from engines.loader import load_engine
from engines.models.pixels import PixelDecoder
from engines.models.transformer import SprintTransformer
from engines.pipeline.calibration import Texts, calibration_texts

CPU = torch.device("cpu")


class Quantised(Checkpoint):
    """The checkpoint with a transformer in fp8, calibrated for one step at its default size."""

    def load_transformer(self, dtype: torch.dtype, device: torch.device) -> SprintTransformer:
        module = quantize(
            super().load_transformer(dtype, device),
            calibration_texts(self),
            [_side(self)],
            (1,),
            self.transformer.in_channels,
        )
        assert isinstance(module, SprintTransformer)
        return module


def measure(options: argparse.Namespace) -> dict[str, Any]:
    checkpoint = open_checkpoint(options.model)
    found: dict[str, Any] = {
        "program": "bench.quality.fp8",
        "command": options.command,
        "model": options.model,
        "weights": checkpoint.weights.sha256()[:12],
        "device": "cpu",
        "machine": machine(),
        "sensitivity": layers(checkpoint, options.pictures),
    }
    if options.score:
        found["score"] = {
            "prompts": options.prompts,
            "seeds": options.seeds,
            "steps": options.steps,
            "allowed": options.allowed,
            "fp32": _score(checkpoint, options),
            "fp8": _score(Quantised(**vars(checkpoint)), options),
        }
        scores = found["score"]
        scores["apart"] = round(scores["fp8"]["mean"] - scores["fp32"]["mean"], 4)
    return found


def layers(checkpoint: Checkpoint, pictures: int) -> dict[str, Any]:
    """SQNR in dB of the decoded pictures: of all layers of the table together, and of each alone, worst first."""
    side, channels = _side(checkpoint), checkpoint.transformer.in_channels
    texts = calibration_texts(checkpoint)
    chosen = texts.rows(pictures)
    decoder = PixelDecoder(checkpoint.load_autoencoder(torch.float32, CPU))

    def decoded(module: nn.Module) -> Tensor:
        """[P, 3, H, W] before it is rounded to bytes."""
        latents = run_samples(module, Texts(chosen.states, chosen.mask), [side], (1,), channels)
        return torch.cat([decoder.decoder(latent / decoder.scaling_factor) for latent in latents])

    module: nn.Module = checkpoint.load_transformer(torch.float32, CPU)
    with torch.inference_mode():
        reference = decoded(module)
    module = quantize(module, texts, [side], (1,), channels)
    alone = sensitivity(module, decoded, reference)
    with torch.inference_mode():
        power, noise = reference.square().mean(), (decoded(module) - reference).square().mean()
    together = 10 * float((power / noise).log10())
    return {
        "pictures": pictures,
        "together_db": round(together, 2),
        "layers": {name: round(value, 2) for name, value in alone.items()},
        "kept_out": sorted({decide(name).pattern for name in _all_layers(module)} - _patterns(module)),
    }


def _all_layers(module: nn.Module) -> list[str]:
    return [name for name, part in module.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)]


def _patterns(module: nn.Module) -> set[str]:
    return {decide(name).pattern for name in quantised_layers(module)}


def _score(checkpoint: Checkpoint, options: argparse.Namespace) -> dict[str, Any]:
    engine = load_engine(checkpoint, backend="eager", precision="fp32", device="cpu", max_batch=8)
    generate = engine_generator(engine, options.steps, 4.5)
    report = evaluate(generate, evaluation_prompts(options.prompts), range(options.seeds))
    engine.close()
    return {"mean": report.mean, "spread": report.spread, "categories": report.categories}


def _side(checkpoint: Checkpoint) -> tuple[int, int]:
    width, height = checkpoint.settings.default_size
    unit = checkpoint.autoencoder.compression
    return height // unit, width // unit


def show(found: dict[str, Any]) -> str:
    """The tables for people."""
    told = found["sensitivity"]
    parts = [f"`{found['model']}` (weights {found['weights']})."]
    if "score" in found:
        score = found["score"]
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
        f"SQNR of {told['pictures']} decoded images against fp32: {told['together_db']} dB with every layer of the "
        "table in fp8; with one layer alone, worst first:",
        table(("layer", "SQNR, dB"), [[f"`{name}`", value] for name, value in told["layers"].items()]),
        f"Not quantised, by the table: {', '.join(f'`{pattern}`' for pattern in told['kept_out'])}.",
    ]
    return "\n\n".join(parts)


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality.fp8", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny", help="folder, hub id, or random:<name> (default tiny)")
    parser.add_argument("--prompts", type=int, default=500, help="held-out captions to judge (default 500)")
    parser.add_argument("--seeds", type=int, default=3, help="pictures of each caption (default 3)")
    parser.add_argument("--steps", type=int, default=1, choices=(1, 2, 3, 4))
    parser.add_argument("--allowed", type=float, default=0.02, help="distance of the scores (default 0.02)")
    parser.add_argument("--no-score", dest="score", action="store_false", help="sensitivity alone")
    parser.add_argument("--pictures", type=int, default=4, help="that sensitivity is measured on (default 4)")
    given = sys.argv[1:] if argv is None else argv
    parser.set_defaults(command=command("bench.quality.fp8", given))
    options = parser.parse_args(given)
    if min(options.prompts, options.seeds, options.pictures) < 1:
        parser.error("--prompts, --seeds and --pictures: needed is 1 at least")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parsed(argv)
    return told(
        lambda: measure(options),
        show,
        lambda found: options.score and abs(found["score"]["apart"]) > options.allowed,
    )


if __name__ == "__main__":
    sys.exit(main())
