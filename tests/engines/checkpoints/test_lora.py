"""LoRA files: reading, refusals that name file and key, and fusing."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_checkpoint import EVERYWHERE, random_factors, save_lora
from torch import Tensor

from engines.checkpoints.checkpoint import Checkpoint, open_checkpoint
from engines.checkpoints.lora import with_adapters
from engines.errors import CheckpointError
from engines.models.transformer import SprintTransformer
from engines.types import AdapterOption

CPU = torch.device("cpu")
Q = "transformer_blocks.0.attn1.to_q"


@pytest.fixture
def checkpoint(folder: Path) -> Checkpoint:
    return open_checkpoint(str(folder))


def loaded(checkpoint: Checkpoint) -> SprintTransformer:
    return checkpoint.load_transformer(torch.float32, CPU)


def fused(checkpoint: Checkpoint, path: Path, scale: float = 1.0) -> SprintTransformer:
    made, free = with_adapters(checkpoint, [AdapterOption("one", str(path), scale)], {})
    assert not free
    return loaded(made)


def plain(tensors: dict[str, Tensor], name: str) -> Tensor:
    down, up = (tensors[f"transformer.{name}.lora_{part}.weight"].flatten(1) for part in "AB")
    return up @ down


def test_fusing_adds_scaled_products_to_the_named_weights_alone(checkpoint: Checkpoint, tmp_path: Path) -> None:
    before = loaded(checkpoint)
    tensors = random_factors(before, EVERYWHERE, 3, 0)
    after = fused(checkpoint, save_lora(tmp_path / "a.safetensors", tensors), -0.5).state_dict()
    for key, weight in before.state_dict().items():
        name = key.removesuffix(".weight")
        added = -0.5 * plain(tensors, name).view_as(weight) if name in EVERYWHERE and key.endswith("weight") else 0.0
        assert torch.allclose(after[key], weight + added, atol=1e-6), key


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"r": 3, "lora_alpha": 6}, 2.0),
        ({"r": 3, "lora_alpha": 6, "use_rslora": True}, 6 / 3**0.5),
        ({"r": 3, "lora_alpha": 3, "alpha_pattern": {"attn1.to_q": 12}}, 4.0),
        ({"r": 3, "lora_alpha": 3, "alpha_pattern": {"attn1.to_k": 12}}, 1.0),
    ],
)
def test_alpha_is_read_where_diffusers_and_peft_write_it(
    checkpoint: Checkpoint, tmp_path: Path, config: dict[str, object], scale: float
) -> None:
    before = loaded(checkpoint)
    tensors = random_factors(before, [Q], 3, 0)
    wanted = before.get_submodule(Q).weight + scale * plain(tensors, Q)
    found = fused(checkpoint, save_lora(tmp_path / "a.safetensors", tensors, config))
    assert torch.allclose(found.get_submodule(Q).weight, wanted, atol=1e-6)
    peft = {key.replace("transformer.", "base_model.model.", 1): value for key, value in tensors.items()}
    save_file(peft, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    assert torch.allclose(fused(checkpoint, tmp_path).get_submodule(Q).weight, wanted, atol=1e-6)


def test_a_key_of_alpha_counts_too(checkpoint: Checkpoint, tmp_path: Path) -> None:
    before = loaded(checkpoint)
    tensors = random_factors(before, [Q], 3, 0)
    path = save_lora(tmp_path / "a.safetensors", tensors | {f"transformer.{Q}.alpha": torch.tensor(1.5)})
    wanted = before.get_submodule(Q).weight + 0.5 * plain(tensors, Q)
    assert torch.allclose(fused(checkpoint, path).get_submodule(Q).weight, wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"transformer.transformer_blocks.0.attn1.to_z.lora_A.weight": torch.ones(3, 32)}, "attn1.to_z is no module"),
        ({"text_encoder.layers.0.lora_A.weight": torch.ones(3, 32)}, "text_encoder.layers.0 is no module"),
        ({f"transformer.{Q}.lora_B.bias": torch.ones(32)}, "to_q.lora_B.bias"),
        ({f"transformer.{Q}.dora_scale": torch.ones(32)}, "DoRA"),
        ({f"transformer.{Q}.lora_magnitude_vector": torch.ones(32)}, "DoRA"),
        ({f"transformer.{Q}.lora_A.weight": torch.ones(3, 31)}, r"lora_A has shape \[3, 31\], \[3, 32\]"),
        ({f"transformer.{Q}.lora_B.weight": torch.ones(32, 4)}, r"lora_B has shape \[32, 4\], \[32, 3\]"),
        ({"transformer.transformer_blocks.0.attn1.to_k.lora_A.weight": torch.ones(3, 32)}, "to_k lacks its lora_B"),
        (
            {"transformer.transformer_blocks.0.ff.conv_depth.lora_A.weight": torch.ones(3, 1, 3, 3)},
            "conv_depth is a 3x3 depthwise convolution",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    checkpoint: Checkpoint, tmp_path: Path, change: dict[str, Tensor], told: str
) -> None:
    tensors = random_factors(loaded(checkpoint), [Q], 3, 0) | change
    with pytest.raises(CheckpointError, match=rf"lora one: .*{told}"):
        fused(checkpoint, save_lora(tmp_path / "a.safetensors", tensors))


def test_dora_is_refused_by_its_config_too(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = save_lora(tmp_path / "a.safetensors", random_factors(loaded(checkpoint), [Q], 3, 0), {"use_dora": True})
    with pytest.raises(CheckpointError, match="use_dora"):
        fused(checkpoint, path)


@pytest.mark.parametrize("content", [None, b"", b"no tensors here"])
def test_a_file_that_is_absent_or_damaged_is_told(
    checkpoint: Checkpoint, tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "a.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"lora one: .*a\.safetensors"):
        fused(checkpoint, path)


def test_the_digest_of_the_weights_knows_the_adapter_and_its_scale(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = save_lora(tmp_path / "a.safetensors", random_factors(loaded(checkpoint), [Q], 3, 0))
    option = AdapterOption("one", str(path), 1.0)
    digests = {
        with_adapters(checkpoint, some, {})[0].weights.sha256() for some in ([], [option], [option._replace(scale=2.0)])
    }
    save_lora(path, random_factors(loaded(checkpoint), [Q], 3, 1))
    digests.add(with_adapters(checkpoint, [option], {})[0].weights.sha256())
    assert len(digests) == 4


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("ring=a.safetensors", AdapterOption("ring", "a.safetensors")),
        ("ring=a.safetensors:-0.5", AdapterOption("ring", "a.safetensors", -0.5)),
        ("r.1=/x:y/a", AdapterOption("r.1", "/x:y/a")),
    ],
)
def test_an_option_is_read_and_written(text: str, option: AdapterOption) -> None:
    assert AdapterOption.parse(text) == option
    assert str(option) == text


@pytest.mark.parametrize("text", ["ring", "=a", "ring=", "a b=c", "ring=a:5"])
def test_an_option_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"NAME=PATH\[:SCALE\]|allowed -4 to 4"):
        AdapterOption.parse(text)


def test_two_of_one_name_are_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match="one, one"):
        with_adapters(checkpoint, [AdapterOption("one", "a"), AdapterOption("one", "b")], {})


@pytest.mark.slow
def test_fusing_equals_diffusers_at_true_widths(tmp_path: Path) -> None:
    """Compares all module types at the 0.6B's width, in two blocks, with load_lora_weights + fuse_lora."""
    pytest.importorskip("peft", reason="diffusers loads a LoRA through peft alone")
    from diffusers import SanaSprintPipeline, SanaTransformer2DModel

    random = open_checkpoint("random:sprint-0.6b")
    checkpoint = replace(random, transformer=replace(random.transformer, num_layers=2))
    ours = loaded(checkpoint)
    config = {"r": 16, "lora_alpha": 8, "target_modules": list(EVERYWHERE)}
    path = save_lora(tmp_path / "a.safetensors", random_factors(ours, EVERYWHERE, 16, 0), config)
    theirs = SanaTransformer2DModel(
        **{
            key: value
            for key, value in checkpoint.transformer.to_dict().items()
            if not key.startswith("_") and key != "timestep_scale"
        }
    )
    theirs.load_state_dict(ours.state_dict(), strict=False)
    parts = dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler"))
    pipeline = SanaSprintPipeline(transformer=theirs, **parts)
    pipeline.load_lora_weights(str(path))
    pipeline.fuse_lora(lora_scale=0.7)
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(2, 32, 8, 8, generator=generator)
    text = torch.randn(2, 7, 2304, generator=generator)
    time, guidance = torch.tensor([1.0, 0.5]), torch.tensor([0.45, 0.4])
    with torch.inference_mode():
        expected = theirs(latent, encoder_hidden_states=text, timestep=time, guidance=guidance, return_dict=False)[0]
        found = fused(checkpoint, path, 0.7)(latent, text, time, guidance)
        without = ours(latent, text, time, guidance)
    assert float((expected - without).abs().max()) > 0.1
    assert float((expected - found).abs().max()) <= 1e-4
