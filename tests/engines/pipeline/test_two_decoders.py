"""--fast-decoder: jobs of one batch are denoised together, and each is decoded by the decoder that it names."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engines.backends.cuda.graphs import EagerReplay
from engines.checkpoints.checkpoint import open_checkpoint
from engines.errors import CheckpointError, JobError
from engines.loader import load_engine
from engines.models.taesana import TaesanaConfig, TaesanaDecoder
from engines.types import Engine, Job

TINY = Path(__file__).resolve().parents[3] / "models" / "tiny"
WEIGHTS = "diffusion_pytorch_model.safetensors"
CPU = torch.device("cpu")
FULL = Job("a red circle", 7, 64, 64)
FAST = Job("a blue square", 8, 64, 64, decoder="fast")


@pytest.fixture(scope="module")
def taesana(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, config = tmp_path_factory.mktemp("taesana"), TaesanaConfig(32, (24, 16, 8, 8, 8, 8), (1,) * 6)
    torch.manual_seed(3)
    save_file(TaesanaDecoder(config).state_dict(), folder / WEIGHTS)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return folder


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoencoder's folder whose file holds its decoder alone, another one than tiny's."""
    folder = tmp_path_factory.mktemp("other") / "vae"
    folder.mkdir()
    shutil.copy(TINY / "vae" / "config.json", folder)
    weights = {key: value for key, value in load_file(TINY / "vae" / WEIGHTS).items() if key.startswith("decoder.")}
    weights["decoder.norm_out.bias"] = weights["decoder.norm_out.bias"] + 1
    save_file(weights, folder / WEIGHTS)
    return folder


def load(backend: str, **options: object) -> Engine:
    recorder = EagerReplay() if backend == "cuda-graph" else None
    return load_engine(
        str(TINY), backend=backend, precision="fp32", device="cpu", max_batch=2, recorder=recorder, **options
    )


@pytest.mark.parametrize("backend", ["eager", "cuda-graph"])
@pytest.mark.parametrize("second", ["taesana", "autoencoder"])
def test_each_image_of_a_batch_is_that_of_its_decoder_alone(
    backend: str, second: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(second)
    engine = load(backend, fast_decoder=str(folder))
    engine.warmup()
    full, fast = (image.pixels for image in engine.generate([FULL, FAST]))
    own = load("eager")
    assert abs(full.astype(int) - own.generate([FULL])[0].pixels).max() <= 1
    [as_full] = own.generate([Job(FAST.prompt, FAST.seed, 64, 64)])
    assert abs(fast.astype(int) - as_full.pixels).max() > 20
    if second == "taesana":  # the autoencoder's file has no encoder, which --decoder needs
        [alone] = load("eager", decoder=str(folder)).generate([Job(FAST.prompt, FAST.seed, 64, 64)])
        assert abs(fast.astype(int) - alone.pixels).max() <= 1
    assert engine.info.decoders == {"full": "full", "fast": str(folder)}
    assert engine.limits.decoders == ("full", "fast")


def test_an_engine_with_one_decoder_names_what_is_loaded() -> None:
    engine = load("eager")
    assert engine.info.decoders == {"full": "full"}
    with pytest.raises(JobError, match="decoder: got 'fast', loaded: full; give a second one at start, such as"):
        engine.generate([FAST])


def test_two_decoders_differ_and_their_latents_agree(taesana: Path, tmp_path: Path) -> None:
    for first, second in (("full", "full"), (str(taesana), str(taesana))):
        with pytest.raises(CheckpointError, match=r"fast_decoder: got .*, another one than the first is needed"):
            load("eager", decoder=first, fast_decoder=second)
    config = json.loads((TINY / "vae" / "config.json").read_text())
    folder = tmp_path / "vae"
    folder.mkdir()
    names = [name for name in config if name.startswith(("encoder_", "decoder_")) and isinstance(config[name], list)]
    (folder / "config.json").write_text(json.dumps(config | {name: config[name][:-1] for name in names}))
    with pytest.raises(CheckpointError, match="an AutoencoderDC for latents of 32 channels and 16 pixels a side"):
        load("eager", fast_decoder=str(folder))


def test_random_weights_have_a_second_decoder_and_a_digest_for_each() -> None:
    checkpoint = open_checkpoint(open_checkpoint("random:sprint-0.6b", "taesana"), "lite")
    assert (checkpoint.taesana, checkpoint.decoder) == (None, "lite")
    digests = {name: open_checkpoint("random:sprint-0.6b", name).weights.sha256() for name in ("full", "lite")}
    assert digests["full"] != digests["lite"]


def _without(checkpoint: Path, unwanted: Callable[[str], bool]) -> None:
    path = checkpoint / "vae" / WEIGHTS
    kept = {key: value for key, value in load_file(path).items() if not unwanted(key)}
    path.unlink()  # may be a link
    save_file(kept, path)


def test_beside_a_taesana_the_encoder_is_read_alone_and_strictly(taesana: Path, tmp_path: Path) -> None:
    model = shutil.copytree(TINY, tmp_path / "tiny", ignore=shutil.ignore_patterns("controlnet"))
    _without(model, lambda key: key.startswith("decoder."))
    checkpoint = open_checkpoint(str(model), str(taesana))
    autoencoder = checkpoint.load_autoencoder(torch.float32, CPU)
    assert not hasattr(autoencoder, "decoder")
    with pytest.raises(CheckpointError, match=r"missing keys: decoder\."):
        open_checkpoint(str(model)).load_autoencoder(torch.float32, CPU)
    _without(model, lambda key: key == "encoder.conv_out.bias")
    with pytest.raises(CheckpointError, match=r"vae, encoder: missing keys: conv_out\.bias"):
        checkpoint.load_autoencoder(torch.float32, CPU)
