"""Drawings through the whole engine, and the refusal of each ControlNet that does not fit."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_checkpoint import randomise_weights

from engines.checkpoints.checkpoint import open_checkpoint
from engines.errors import CheckpointError, JobError
from engines.loader import load_engine
from engines.models.controlnet import ControlConfig, ControlledTransformer, ControlNet, Injection
from engines.models.pixels import PixelEncoder
from engines.pipeline.engine import SprintEngine
from engines.pipeline.latent_cache import LatentCache
from engines.pipeline.text_stage import join, load_text_stage
from engines.sampler import job_noise
from engines.types import Engine, Job, Pixels, RawImage

FP32, CPU = torch.float32, torch.device("cpu")


def save_controlnet(folder: Path, checkpoint: Path, injection: Injection) -> Path:
    transformer = open_checkpoint(str(checkpoint)).load_transformer(FP32, CPU)
    branch = randomise_weights(ControlNet.of(transformer, 1, injection), 5)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(branch.config.to_dict()))
    save_file(branch.state_dict(), folder / "diffusion_pytorch_model.safetensors")
    return folder


@pytest.fixture(scope="module", params=["diffusers", "nvlabs"])
def drawable(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the small checkpoint with a ControlNet in its folder."""
    copy = tmp_path_factory.mktemp(request.param) / "sprint"
    copy.mkdir()
    for entry in folder.iterdir():
        (copy / entry.name).symlink_to(entry)
    save_controlnet(copy / "controlnet", folder, request.param)
    return copy


@pytest.fixture(scope="module")
def engine(drawable: Path) -> Iterator[Engine]:
    made = load_engine(str(drawable), max_batch=4)
    yield made
    made.close()


def drawing(place: int = 20, side: int = 64) -> Pixels:
    pixels = np.zeros((side, side, 3), np.uint8)
    pixels[place : place + 6, 10:50] = 255
    return pixels


def job(number: int = 0, **changes: object) -> Job:
    return replace(Job("a red circle", seed=number, width=64, height=64, control_image=drawing()), **changes)


def pixels(engine: Engine, *jobs: Job) -> list[Pixels]:
    return [image.pixels for image in engine.generate(jobs)]


def farthest(one: Pixels, other: Pixels) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


def test_a_controlnet_in_the_folder_is_offered(engine: Engine, folder: Path) -> None:
    assert engine.limits.conditioning == {"text", "image", "control", "image+control"}
    assert load_engine(str(folder)).limits.conditioning == {"text", "image"}


def test_the_image_is_what_the_modules_make_one_after_the_other(engine: Engine, drawable: Path) -> None:
    checkpoint = open_checkpoint(str(drawable))
    transformer = checkpoint.load_transformer(FP32, CPU)
    written = drawable / "controlnet"
    branch = ControlNet(ControlConfig.from_dict(json.loads((written / "config.json").read_text())))
    branch.load_state_dict(load_file(written / "diffusion_pytorch_model.safetensors"))
    autoencoder = checkpoint.load_autoencoder(FP32, CPU)
    text, mask = join(load_text_stage(checkpoint, FP32, CPU).encode(["a red circle"]))
    with torch.inference_mode():
        control = PixelEncoder(autoencoder)(torch.tensor(drawing())[None])
        noise = job_noise(0, (8, 8, 8), 1)
        one = torch.ones(1)
        run = ControlledTransformer(transformer, branch).eval()
        latent = noise - run(noise, text, one, 0.45 * one, mask, control, 0.7 * one)
        image = autoencoder.decoder(latent / autoencoder.config.scaling_factor)
    wanted = ((image / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)[0].permute(1, 2, 0).numpy()
    [found] = pixels(engine, job(control_scale=0.7))
    assert farthest(found, wanted) <= 1


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_scale_zero_is_no_control_to_the_pixel(engine: Engine, steps: int) -> None:
    plain = pixels(engine, *(job(n, steps=steps, control_image=None) for n in range(3)))
    silent = pixels(engine, *(job(n, steps=steps, control_scale=0.0) for n in range(3)))
    drawn = pixels(engine, *(job(n, steps=steps) for n in range(3)))
    for one, other, controlled in zip(plain, silent, drawn, strict=True):
        np.testing.assert_array_equal(one, other)
        assert farthest(one, controlled) > 20


def test_jobs_of_a_batch_keep_their_own_drawing_and_scale(engine: Engine) -> None:
    jobs = [
        job(0),
        job(0, control_image=drawing(40)),
        job(0, control_scale=0.3),
        job(1, control_image=drawing(side=96)),
    ]
    together = pixels(engine, *jobs)
    for one, made in zip(jobs, together, strict=True):
        assert farthest(made, pixels(engine, one)[0]) <= 1
    for other in together[1:]:
        assert farthest(together[0], other) > 5


def test_an_image_may_be_drawn_over(engine: Engine) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    both = job(image=photo, strength=0.5)
    found = [
        pixels(engine, one)[0]
        for one in (
            both,
            replace(both, control_image=None),
            replace(both, image=None),
            replace(both, control_scale=0.0),
        )
    ]
    assert both.conditioning == "image+control"
    np.testing.assert_array_equal(found[1], found[3])
    assert min(farthest(found[0], other) for other in found[1:3]) > 20


def test_a_scale_outside_its_range_is_refused(engine: Engine) -> None:
    with pytest.raises(JobError, match=r"control_scale: got 2\.5, allowed 0 to 2"):
        engine.generate([job(control_scale=2.5)])


def test_a_drawing_that_stands_still_is_encoded_once(drawable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []
    forward = PixelEncoder.forward

    def counted(self: PixelEncoder, given: torch.Tensor) -> torch.Tensor:
        encoded.append(len(given))
        return forward(self, given)

    monkeypatch.setattr(PixelEncoder, "forward", counted)
    engine = load_engine(str(drawable), max_batch=4)
    first = pixels(engine, job(0))
    assert encoded == [1]
    assert farthest(pixels(engine, job(0), job(1, control_image=drawing().copy()))[0], first[0]) <= 1
    assert encoded == [1]
    pixels(engine, job(0, width=96))  # the same strokes, stretched otherwise
    pixels(engine, job(0), job(0, control_image=drawing(41)), job(0, control_image=drawing(42)))
    assert encoded == [1, 1, 2]


def test_warm_up_draws_too(drawable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    generate = SprintEngine.generate

    def recorded(self: SprintEngine, jobs: Sequence[Job]) -> list[RawImage]:
        ran.append(jobs[0].conditioning)
        return generate(self, jobs)

    monkeypatch.setattr(SprintEngine, "generate", recorded)
    load_engine(str(drawable)).warmup()
    assert ran == ["text", "control"]


def test_the_cache_is_bounded_and_forgets_what_was_used_longest_ago() -> None:
    calls: list[int] = []

    def encode(given: torch.Tensor) -> torch.Tensor:
        calls.append(len(given))
        return given[:, :1, :1, 0].float()

    cache = LatentCache(encode, max_bytes=8)
    images = [np.full((2, 2, 3), level, np.uint8) for level in range(3)]

    def ask(*levels: int) -> list[float]:
        return cache.latents([images[level] for level in levels], torch.tensor, (2, 2)).flatten().tolist()

    assert ask(0, 1, 0) == [0, 1, 0]
    assert calls == [2]
    assert ask(0) == [0]
    assert ask(2) == [2]  # drops 1
    assert ask(0) == [0]
    assert calls == [2, 1]
    assert ask(1, 0) == [1, 0]
    assert calls == [2, 1, 1]


Damage = Callable[[Path], None]


def config_with(**changes: object) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no such file"),
        (config_with(_class_name="ControlNetModel"), "holds a ControlNetModel; a SanaControlNetModel is needed"),
        (config_with(injection="both"), "injection: got 'both'"),
        (config_with(caption_channels=24), "caption_channels is 24, the transformer's 48; it was made for another"),
        (config_with(num_layers=2), "num_layers is 2; fewer than the transformer's 2"),
        (config_with(qk_norm=None), "unknown keys: transformer_blocks"),
        (lambda folder: (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"x" * 64), "damaged"),
    ],
)
def test_a_controlnet_that_does_not_fit_is_refused(damage: Damage, said: str, folder: Path, tmp_path: Path) -> None:
    damage(save_controlnet(tmp_path / "controlnet", folder, "diffusers"))
    with pytest.raises(CheckpointError) as refused:
        load_engine(str(folder), controlnet=str(tmp_path / "controlnet"))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_controlnet_from_elsewhere(folder: Path, tmp_path: Path) -> None:
    save_controlnet(tmp_path / "elsewhere" / "controlnet", folder, "diffusers")
    for name in (tmp_path / "elsewhere", tmp_path / "elsewhere" / "controlnet"):
        engine = load_engine(str(folder), controlnet=str(name))
        assert "control" in engine.limits.conditioning
    shutil.rmtree(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="is no folder"):
        load_engine(str(folder), controlnet=str(tmp_path / "elsewhere"))
