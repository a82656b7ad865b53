"""--decoder: another decoder of the same latents takes the place of the checkpoint's own."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engines.backends.cpu.int8 import has_int8
from engines.checkpoints.checkpoint import Checkpoint, open_checkpoint
from engines.errors import CheckpointError
from engines.loader import load_engine
from engines.models.dcae import DC_AE_LITE
from engines.models.taesana import TaesanaConfig, TaesanaDecoder
from engines.types import Job

TINY = Path(__file__).resolve().parents[3] / "models" / "tiny"
CPU = torch.device("cpu")
CONFIG = TaesanaConfig(32, (24, 16, 8, 8, 8, 8), (1, 2, 1, 1, 1, 1))  # for tiny's latents
JOB = Job("a red circle", 7, 64, 96)


@pytest.fixture(scope="module")
def decoder() -> TaesanaDecoder:
    torch.manual_seed(3)
    return TaesanaDecoder(CONFIG).eval()


@pytest.fixture
def saved(decoder: TaesanaDecoder, tmp_path: Path) -> Path:
    """The decoder as a folder."""
    save_file(decoder.state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    return tmp_path


def decode(checkpoint: Checkpoint, latent: torch.Tensor) -> torch.Tensor:
    module = checkpoint.load_pixel_decoder(checkpoint.load_autoencoder(torch.float32, CPU), torch.float32, CPU)
    with torch.inference_mode():
        pixels: torch.Tensor = module(latent)[0]
    return pixels


def test_a_folder_decodes_latents_of_unit_variance(decoder: TaesanaDecoder, saved: Path) -> None:
    checkpoint = open_checkpoint(str(TINY), str(saved))
    latent = torch.randn(2, 32, 2, 3, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = (decoder(latent) / 2 + 0.5).clamp(0, 1).mul(255).round().permute(0, 2, 3, 1).to(torch.uint8)
    assert torch.equal(decode(checkpoint, latent), expected)
    assert checkpoint.weights.sha256() != open_checkpoint(str(TINY)).weights.sha256()


def test_the_engine_decodes_with_it(saved: Path) -> None:
    full, other = (load_engine(str(TINY), precision="fp32", decoder=name) for name in ("full", str(saved)))
    [own], [changed] = (engine.generate([JOB]) for engine in (full, other))
    assert own.pixels.shape == changed.pixels.shape == (96, 64, 3)
    assert (own.pixels != changed.pixels).any()


def test_the_name_taesana_takes_the_folder_of_the_checkpoint(saved: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "own"
    shutil.copytree(TINY, checkpoint, ignore=shutil.ignore_patterns("taesana"))
    with pytest.raises(CheckpointError, match=r"taesana does not exist; give the path of taesana_decoder\.pth"):
        open_checkpoint(str(checkpoint), "taesana")
    (checkpoint / "taesana").mkdir()
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        shutil.copy(saved / name, checkpoint / "taesana" / name)
    latent = torch.randn(1, 32, 2, 2)
    assert torch.equal(
        decode(open_checkpoint(str(checkpoint), "taesana"), latent),
        decode(open_checkpoint(str(TINY), str(saved)), latent),
    )


def test_the_published_file_loads_as_it_is(tmp_path: Path) -> None:
    """A state dict in fp16 by torch.save, under the positions of one sequence."""
    torch.manual_seed(5)
    published = TaesanaDecoder(TaesanaConfig()).half()
    torch.save(published.state_dict(), tmp_path / "taesana_decoder.pth")
    checkpoint = open_checkpoint(str(TINY), str(tmp_path / "taesana_decoder.pth"))
    assert checkpoint.taesana == TaesanaConfig()
    pixels = decode(checkpoint, torch.randn(1, 32, 1, 2))
    assert pixels.shape == (1, 32, 64, 3)
    (tmp_path / "code.pth").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(CheckpointError, match=r"code\.pth: damaged or cut short"):
        decode(open_checkpoint(str(TINY), str(tmp_path / "code.pth")), torch.randn(1, 32, 1, 1))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            TaesanaConfig(16, CONFIG.channels, CONFIG.blocks),
            "latents of 16 channels and 32 pixels a side; the checkpoint has 32",
        ),
        (TaesanaConfig(32, (8, 8, 8), (1, 1, 1)), "32 channels and 4 pixels a side"),
        (TaesanaConfig(32, CONFIG.channels, (1,) * 6), "missing keys: 11.weight"),
    ],
)
def test_a_decoder_of_other_latents_or_weights_is_refused(config: TaesanaConfig, message: str, saved: Path) -> None:
    (saved / "config.json").write_text(json.dumps(config.to_dict()))
    with pytest.raises(CheckpointError, match=message):
        decode(open_checkpoint(str(TINY), str(saved)), torch.randn(1, 32, 1, 1))


def test_random_weights_have_each_published_decoder() -> None:
    assert open_checkpoint("random:sprint-0.6b", "lite").autoencoder == DC_AE_LITE
    assert open_checkpoint("random:sprint-0.6b", "taesana").taesana == TaesanaConfig()
    with pytest.raises(CheckpointError, match="full, lite or taesana is allowed"):
        open_checkpoint("random:sprint-0.6b", "some/where")


@pytest.mark.skipif(not has_int8(), reason="this CPU has no 8-bit products (AVX512-VNNI)")
def test_int8_leaves_a_taesana_as_it_is(saved: Path) -> None:
    engine = load_engine(str(TINY), precision="int8", decoder=str(saved))
    assert "a TAESANA has no convolutions in 8 bits" in engine.info.reasons["decoder"]
    [image] = engine.generate([Job("a red circle", 0, 64, 64)])
    assert image.pixels.shape == (64, 64, 3)
