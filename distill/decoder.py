"""Trains, writes and judges a small decoder (TAESANA's architecture) for the tiny checkpoint.

    python -m distill.decoder --model models/tiny --recipe tiny --out runs/decoder    # writes runs/decoder/taesana/
    python -m distill.decoder --model models/tiny --recipe tiny --judge models/tiny/taesana

Prints the shares of right one-step images, with the small decoder and with the checkpoint's own, over the same held-out
captions. The last line is one JSON document.
"""

import json
from collections.abc import Sequence

import torch
from accelerate import Accelerator

from distill.evaluation.scores import engine_generator, evaluate, evaluation_prompts
from distill.stages.small_decoder import train
from distill.training.checkpoint_writer import write_json, write_weights
from distill.training.command import parse_command
from engines.checkpoints.checkpoint import open_checkpoint
from engines.loader import load_engine

GUIDANCE = 4.5


def main(argv: Sequence[str] | None = None) -> None:
    command = parse_command(__doc__, "decoder, OUT/taesana", lambda recipe: recipe.small_decoder, argv)
    recipe, folder = command.recipe, command.judge
    assert recipe.small_decoder is not None
    if folder is None:
        assert command.out is not None
        folder = command.out / "taesana"
        checkpoint = open_checkpoint(command.model)
        decoder = train(recipe.small_decoder, recipe.world, checkpoint, command.out, Accelerator())
        write_weights(folder / "diffusion_pytorch_model.safetensors", decoder.state_dict(), torch.bfloat16)
        write_json(folder / "config.json", recipe.small_decoder.architecture.to_dict())
    if command.prompts:
        small, full = (correct_share(command.model, name, command.prompts) for name in (str(folder), "full"))
        print(f"{small:.1%} right with the small decoder, {full:.1%} with the checkpoint's own")
        print(json.dumps({"model": command.model, "prompts": command.prompts, "small": small, "full": full}))


def correct_share(model: str, decoder: str, prompts: int) -> float:
    """Returns the share of right one-step images. decoder: a value of --decoder."""
    engine = load_engine(model, precision="fp32", decoder=decoder)
    try:
        return evaluate(engine_generator(engine, 1, GUIDANCE), evaluation_prompts(prompts)).mean
    finally:
        engine.close()


if __name__ == "__main__":
    main()
