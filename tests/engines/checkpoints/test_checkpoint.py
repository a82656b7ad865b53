"""Checkpoints that load, and the one line that refuses all others."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engines.checkpoints.checkpoint import SprintConfig, open_checkpoint
from engines.checkpoints.weights import weight_files
from engines.errors import CheckpointError

CPU = torch.device("cpu")


def load_all(name: str, decoder: str | None = None) -> None:
    checkpoint = open_checkpoint(name, decoder)
    checkpoint.load_transformer(torch.float32, CPU)
    checkpoint.load_autoencoder(torch.float32, CPU)
    checkpoint.load_text_body(torch.float32, CPU)
    checkpoint.load_tokenizer()


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def cut(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"

# Damage of a copy of a valid checkpoint, and the text that the message must contain.
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no index": (lambda f: (f / "model_index.json").unlink(), r"model_index\.json: no such file"),
    "another pipeline": (
        lambda f: edit(f / "model_index.json", _class_name="FluxPipeline"),
        "holds a FluxPipeline; a SanaSprintPipeline checkpoint is needed",
    ),
    "not JSON": (lambda f: (f / "model_index.json").write_text("<html>"), "not JSON"),
    "JSON list": (lambda f: (f / "model_index.json").write_text("[]"), "holds a list"),
    "another scheduler": (
        lambda f: edit(f / "scheduler/scheduler_config.json", _class_name="DPMSolverMultistepScheduler"),
        "scheduler is DPMSolverMultistepScheduler",
    ),
    "no part": (lambda f: shutil.rmtree(f / "text_encoder"), r"text_encoder/config\.json: no such file"),
    "base Sana": (lambda f: edit(f / "transformer/config.json", guidance_embeds=False), "base Sana transformer"),
    "unknown key": (lambda f: edit(f / "transformer/config.json", joint_dim=3), "unknown key 'joint_dim'"),
    "unknown autoencoder key": (lambda f: edit(f / "vae/config.json", use_tanh=True), "use_tanh"),
    "another autoencoder": (
        lambda f: edit(f / "vae/config.json", _class_name="AutoencoderKL"),
        "holds a AutoencoderKL; an AutoencoderDC is needed",
    ),
    "channels differ": (
        lambda f: edit(f / "vae/config.json", latent_channels=16),
        "8 channels in, 8 out, and the .* 16",
    ),
    "text width differs": (
        lambda f: edit(f / "text_encoder/config.json", hidden_size=2304),
        "hidden_size is 2304, the transformer's caption_channels 48",
    ),
    "another text encoder": (
        lambda f: edit(f / "text_encoder/config.json", model_type="t5"),
        "got 't5', supported: 'gemma2'",
    ),
    "text encoder with heads that do not share out": (
        lambda f: edit(f / "text_encoder/config.json", num_attention_heads=5),
        r"text_encoder/config\.json: num_attention_heads: got 5, needed is a multiple",
    ),
    "no weights": (lambda f: (f / TRANSFORMER).unlink(), "weights must be model.safetensors .* found: none"),
    "pickled weights": (
        lambda f: (f / TRANSFORMER).rename(f / "transformer/diffusion_pytorch_model.bin"),
        r"found: diffusion_pytorch_model\.bin",
    ),
    "cut in the data": (lambda f: cut(f / TRANSFORMER, 0.9), "damaged or cut short"),
    "cut in the header": (lambda f: cut(f / TRANSFORMER, 0.001), "damaged or cut short"),
    "empty file": (lambda f: cut(f / TRANSFORMER, 0), "damaged or cut short"),
    "missing key": (
        lambda f: rewrite(f / TRANSFORMER, lambda t: t.pop("proj_out.bias")),
        r"missing keys: proj_out\.bias; unknown keys: none",
    ),
    "unknown tensor": (
        lambda f: rewrite(f / TRANSFORMER, lambda t: t.update(logvar=torch.zeros(1))),
        "missing keys: none; unknown keys: logvar",
    ),
    "another shape": (
        lambda f: rewrite(f / TRANSFORMER, lambda t: t.update({"proj_out.bias": torch.zeros(9)})),
        r"proj_out\.bias has shape \[9\], its config\.json asks for \[8\]",
    ),
    "quantised": (
        lambda f: rewrite(f / TRANSFORMER, lambda t: t.update({"proj_out.bias": torch.zeros(8, dtype=torch.int8)})),
        r"proj_out\.bias is torch\.int8",
    ),
    "other layers": (lambda f: edit(f / "transformer/config.json", num_layers=1), "unknown keys: .* and 20 more"),
    "slow tokenizer": (
        lambda f: (f / "tokenizer/tokenizer.json").rename(f / "tokenizer/tokenizer.model"),
        r"no tokenizer\.json",
    ),
    "damaged tokenizer": (lambda f: cut(f / "tokenizer/tokenizer.json", 0.5), "not a tokenizer"),
    "unknown setting": (
        lambda f: (f / "sprint.json").write_text('{"steps": 1}'),
        "unknown key 'steps'; known are instruction",
    ),
    "bad setting": (
        lambda f: (f / "sprint.json").write_text('{"default_size": [64]}'),
        r"default_size: got \[64\], like \(1024, 1024\) is needed",
    ),
    "angle beyond the noise": (
        lambda f: (f / "sprint.json").write_text('{"one_step_angle": 1.6}'),
        r"one_step_angle: got 1\.6, like 1\.57",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_refused_in_one_line(damage: Callable[[Path], object], message: str, copy: Path) -> None:
    load_all(str(copy))
    damage(copy)
    with pytest.raises(CheckpointError, match=message) as refusal:
        load_all(str(copy))
    assert "\n" not in str(refusal.value)
    assert str(copy) in str(refusal.value) or "autoencoder config" in str(refusal.value)


def test_a_tokenizer_that_outgrows_the_text_encoder_is_refused(copy: Path) -> None:
    edit(copy / "text_encoder/config.json", vocab_size=100)
    with pytest.raises(CheckpointError, match="the text encoder's vocab_size is 100"):
        open_checkpoint(str(copy)).load_tokenizer()


@pytest.mark.parametrize("name", ["no/such/folder", "./nowhere", "word", "~/nowhere", "/nowhere/at/all"])
def test_a_name_that_is_nothing_lists_what_is_allowed(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"is no folder; give a folder, a hub id .* tiny, sprint-0\.6b"):
        open_checkpoint(name)


def test_a_file_is_no_checkpoint(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="is no folder"):
        open_checkpoint(str(folder / "model_index.json"))


@pytest.mark.parametrize("name", ["random:sprint-9b", "random:", "random:sprint-0.6b:x", "random:sprint-0.6b:-1"])
def test_unknown_random_size_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"allowed random:sprint-0\.6b"):
        open_checkpoint(name)


def test_sharded_weights_load_like_one_file(copy: Path, folder: Path) -> None:
    whole = copy / TRANSFORMER
    tensors = load_file(whole)
    weight_map = {key: f"part-{index % 2}.safetensors" for index, key in enumerate(tensors)}
    for name in set(weight_map.values()):
        save_file(
            {key: tensors[key].clone() for key in tensors if weight_map[key] == name}, copy / "transformer" / name
        )
    index = copy / "transformer/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    whole.unlink()
    loaded = open_checkpoint(str(copy)).load_transformer(torch.float32, CPU).state_dict()
    expected = open_checkpoint(str(folder)).load_transformer(torch.float32, CPU).state_dict()
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)
    (copy / "transformer/part-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"absent: part-1\.safetensors"):
        weight_files(copy / "transformer")


def test_an_index_that_names_nothing_is_refused(copy: Path) -> None:
    (copy / TRANSFORMER).unlink()
    (copy / f"{TRANSFORMER}.index.json").write_text('{"metadata": {}}')
    with pytest.raises(CheckpointError, match="names no files"):
        load_all(str(copy))


def test_weights_take_the_asked_type_and_stay_frozen(folder: Path) -> None:
    module = open_checkpoint(str(folder)).load_text_body(torch.bfloat16, CPU)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert not module.training


def test_digest_changes_with_any_weight(copy: Path) -> None:
    before = open_checkpoint(str(copy)).weights.sha256()
    assert before == open_checkpoint(str(copy)).weights.sha256()
    rewrite(copy / TRANSFORMER, lambda tensors: tensors["proj_out.bias"].add_(1e-3))
    assert open_checkpoint(str(copy)).weights.sha256() != before


def test_settings_come_from_the_folder(copy: Path) -> None:
    assert open_checkpoint(str(copy)).settings == SprintConfig()
    (copy / "sprint.json").write_text(
        '{"instruction": false, "max_prompt_tokens": 24, "default_size": [64, 96], "guidance_trained": [2.5, 3],'
        ' "sizes": [[64, 96], [64, 64]], "one_step_angle": 1.55413}'
    )
    sizes = ((64, 96), (64, 64))
    assert open_checkpoint(str(copy)).settings == SprintConfig(False, 24, (64, 96), (2.5, 3), sizes, 1.55413)


@pytest.mark.parametrize("inside", [True, False], ids=["checkpoint", "autoencoder"])
def test_another_decoder_takes_the_place_of_the_checkpoints(inside: bool, copy: Path, folder: Path) -> None:
    rewrite(copy / "vae/diffusion_pytorch_model.safetensors", lambda t: t["decoder.conv_in.bias"].add_(1))
    edit(copy / "vae/config.json", scaling_factor=0.5)
    other = open_checkpoint(str(folder), str(copy if inside else copy / "vae"))
    assert other.autoencoder.scaling_factor == 0.5
    ours = open_checkpoint(str(folder)).load_autoencoder(torch.float32, CPU)
    difference = other.load_autoencoder(torch.float32, CPU).decoder.conv_in.bias - ours.decoder.conv_in.bias
    torch.testing.assert_close(difference, torch.ones_like(difference))


def test_a_decoder_with_other_latents_is_refused(copy: Path, folder: Path) -> None:
    edit(copy / "vae/config.json", latent_channels=4)
    with pytest.raises(CheckpointError, match="and the autoencoder 4"):
        open_checkpoint(str(folder), str(copy))
