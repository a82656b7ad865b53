"""The stage of the small decoder: what it trains is loaded by --decoder, and a second run trains nothing."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distill.decoder import main
from engines.checkpoints.checkpoint import open_checkpoint

TINY = Path(__file__).resolve().parents[3] / "models" / "tiny"


def test_a_trained_decoder_is_one_that_serves(tmp_path: Path) -> None:
    command = ["--model", str(TINY), "--recipe", "smoke", "--out", str(tmp_path), "--prompts", "0"]
    main(command)
    folder = tmp_path / "taesana"
    checkpoint = open_checkpoint(str(TINY), str(folder))
    autoencoder = checkpoint.load_autoencoder(torch.float32, torch.device("cpu"))
    decoder = checkpoint.load_pixel_decoder(autoencoder, torch.float32, torch.device("cpu"))
    assert decoder(torch.randn(1, 32, 2, 2))[0].shape == (1, 64, 64, 3)
    before = load_file(folder / "diffusion_pytorch_model.safetensors")
    main(command)
    after = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("extra", [[], ["--out", "a", "--judge", "b"]])
def test_one_of_training_and_judging_is_asked_for(extra: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--model", str(TINY), "--recipe", "smoke", *extra])
