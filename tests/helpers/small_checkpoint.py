"""A small checkpoint in the published layout, from the upstream classes, with random weights that all matter."""

import json
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engines.models.dcae import Autoencoder, AutoencoderConfig
from engines.models.taesana import TaesanaConfig, TaesanaDecoder
from engines.models.transformer import SPRINT_0_6B

SAMPLES = [
    "Given a user prompt, generate an 'Enhanced prompt' with details suitable for image generation.",
    "- User Prompt: A cat sleeping -> Enhanced: a small, fluffy white cat, sleeping on a warm sunny windowsill",
    "a red circle to the left of a blue square on a white background, three green triangles",
]

SMALL_TRANSFORMER = replace(
    SPRINT_0_6B,
    num_attention_heads=2,
    attention_head_dim=16,
    num_cross_attention_heads=4,
    cross_attention_head_dim=8,
    num_layers=3,
    caption_channels=24,
    in_channels=4,
    out_channels=6,
    sample_size=4,
)

# The smallest autoencoder whose modules all run in GPU kernels (engines.backends.cuda).
KERNEL_AUTOENCODER = AutoencoderConfig(
    latent_channels=8,
    attention_head_dim=16,
    encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock", "EfficientViTBlock"),
    decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock", "EfficientViTBlock"),
    encoder_block_out_channels=(32, 32, 64, 64),
    decoder_block_out_channels=(32, 32, 64, 64),
    encoder_layers_per_block=(1, 1, 1, 1),
    decoder_layers_per_block=(2, 3, 1, 2),
    encoder_qkv_multiscales=((), (), (5,), (5,)),
    decoder_qkv_multiscales=((), (), (5,), (5,)),
    decoder_norm_types=("rms_norm",) * 4,
    decoder_act_fns=("silu",) * 4,
)

# Decoders of the small checkpoint's latents: TAESANA's architecture, and DC-AE-Lite's.
SMALL_TAESANA = TaesanaConfig(8, (16, 8, 8, 8), (1, 1, 1, 1))
SMALL_LITE = replace(
    KERNEL_AUTOENCODER,
    decoder_block_types=("ResBlock",) * 4,
    decoder_layers_per_block=(0, 1, 1, 1),
    decoder_qkv_multiscales=((),) * 4,
    upsample_block_type="pixel_shuffle",
    decoder_conv_act_fn="silu",
)

# Modules of every kind that a LoRA may adapt.
EVERYWHERE = (
    *("patch_embed.proj", "time_embed.timestep_embedder.linear_1", "time_embed.guidance_embedder.linear_2"),
    *("time_embed.linear", "caption_projection.linear_1", "proj_out"),
    *(
        f"transformer_blocks.{block}.{attention}.{part}"
        for block in (0, 1)
        for attention in ("attn1", "attn2")
        for part in ("to_q", "to_k", "to_v", "to_out.0")
    ),
    *(f"transformer_blocks.1.ff.{part}" for part in ("conv_inverted", "conv_point")),
)


def randomise_weights(module: nn.Module, seed: int = 0) -> nn.Module:
    """Draws weights of unit gain and modulations from N(0, 1), so that a test notices every missing part."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("scale_shift_table"):
                parameter.normal_(generator=generator)
            elif parameter.ndim > 1:
                parameter.normal_(0, (parameter.shape[0] / parameter.numel()) ** 0.5, generator=generator)
            elif name.endswith("bias"):  # PyTorch drew it with its global generator
                parameter.normal_(0, 0.1, generator=generator)
            else:
                parameter.add_(torch.empty_like(parameter).normal_(0, 0.1, generator=generator))
    return module.eval()


def byte_level_tokenizer() -> object:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        SAMPLES,
        trainers.BpeTrainer(
            vocab_size=500,
            show_progress=False,
            special_tokens=["<pad>", "<eos>", "<bos>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    # Padding on the left, as published; both pipelines must ignore it.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", padding_side="left"
    )


def save_checkpoint(folder: Path, *, interpolation_scale: float | None = None) -> Path:
    """Saves 8-channel latents at 1/8 of the side, two transformer blocks, and two Gemma layers with a short window."""
    from diffusers import AutoencoderDC, SanaSprintPipeline, SanaTransformer2DModel, SCMScheduler
    from transformers import Gemma2Config, Gemma2Model

    transformer = SanaTransformer2DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_cross_attention_heads=4,
        cross_attention_head_dim=8,
        cross_attention_dim=32,
        caption_channels=48,
        sample_size=8,
        interpolation_scale=interpolation_scale,
        guidance_embeds=True,
        qk_norm="rms_norm_across_heads",
    )
    vae = AutoencoderDC(
        latent_channels=8,
        attention_head_dim=8,
        encoder_block_types=("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 16, 16, 32),
        decoder_block_out_channels=(8, 16, 16, 32),
        encoder_layers_per_block=(1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        encoder_qkv_multiscales=((), (), (), (5,)),
        decoder_qkv_multiscales=((), (), (), (5,)),
        upsample_block_type="interpolate",
        downsample_block_type="Conv",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    text_encoder = Gemma2Model(
        Gemma2Config(
            vocab_size=512,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=12,
            query_pre_attn_scalar=12,
            sliding_window=100,
            max_position_embeddings=2048,
            attn_implementation="eager",
        )
    )
    pipeline = SanaSprintPipeline(
        tokenizer=byte_level_tokenizer(),
        text_encoder=randomise_weights(text_encoder, 1),
        vae=randomise_weights(vae, 2),
        transformer=randomise_weights(transformer, 3),
        scheduler=SCMScheduler(prediction_type="trigflow", sigma_data=0.5),
    )
    pipeline.save_pretrained(folder)
    return folder


def with_settings(checkpoint: Path, folder: Path, settings: str) -> Path:
    """Links the checkpoint in `folder`, with another sprint.json."""
    folder.mkdir(exist_ok=True)
    for entry in checkpoint.iterdir():
        (folder / entry.name).symlink_to(entry)
    (folder / "sprint.json").write_text(settings)
    return folder


def save_decoder(folder: Path, config: TaesanaConfig | AutoencoderConfig) -> Path:
    """Saves a decoder with random weights as --decoder takes it; an autoencoder has its encoder too."""
    module = TaesanaDecoder(config) if isinstance(config, TaesanaConfig) else Autoencoder(config)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(randomise_weights(module, 4).state_dict(), folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return folder


def random_factors(
    transformer: nn.Module, modules: Iterable[str], rank: int, seed: int, size: float = 0.5
) -> dict[str, Tensor]:
    """Returns LoRA factors under diffusers' keys; each product has about `size` times the gain of its weight."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name in modules:
        weight = transformer.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        tail = (1,) * (weight.ndim - 2)
        out, inputs = weight.shape[:2]
        down = torch.randn(rank, inputs, *tail, generator=generator) * inputs**-0.5
        up = torch.randn(out, rank, *tail, generator=generator) * size * rank**-0.5
        factors |= {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
    return factors


def save_lora(path: Path, tensors: dict[str, Tensor], config: dict[str, object] | None = None) -> Path:
    """Writes a LoRA file; config is peft's LoraConfig, which diffusers stores in the metadata."""
    metadata = {"format": "pt"}
    if config is not None:
        metadata["lora_adapter_metadata"] = json.dumps({f"transformer.{key}": value for key, value in config.items()})
    save_file(tensors, path, metadata)
    return path


def changed_copy(checkpoint: Path, folder: Path, seed: int = 0) -> Path:
    """Copies a checkpoint to `folder` with noise on its transformer's weights; all other files are equal."""
    shutil.copytree(checkpoint, folder)
    [path] = (folder / "transformer").glob("*.safetensors")
    generator = torch.Generator().manual_seed(seed)
    changed = {}
    for name, tensor in load_file(path).items():
        values = tensor.float()
        noise = torch.randn(values.shape, generator=generator)
        changed[name] = (values + 0.3 * values.abs().mean() * noise).to(tensor.dtype)
    save_file(changed, path)
    return folder
