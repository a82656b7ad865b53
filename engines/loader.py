"""From a checkpoint's name to a ready engine: device, precision and backend are decided here, once, with the reason."""

import math
from collections.abc import Mapping
from importlib.metadata import version

import torch

from engines.backends.eager import eager
from engines.backends.spec import Backend, ModuleSpec
from engines.checkpoint import Checkpoint, open_checkpoint
from engines.errors import BackendError, CheckpointError
from engines.models.pixels import PixelDecoder, PixelEncoder
from engines.models.text_encoder import TextEncoder
from engines.pipeline import LatentSpace, Modules, SprintEngine
from engines.prompt import INSTRUCTION, PromptTokenizer
from engines.sampler import Schedule
from engines.text_stage import EmbeddingCache, TextStage
from engines.types import Engine, EngineInfo, Limits

# A further backend enters here, by the name that --backend takes.
BACKENDS: Mapping[str, Backend] = {"eager": eager}

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_engine(
    model: str,
    *,
    engine_dir: str | None = None,
    backend: str = "auto",
    max_batch: int = 8,
    precision: str | None = None,
    device: str | None = None,
    decoder: str | None = None,
    schedule: Schedule = "paper",
) -> Engine:
    """Loads `model` (see engines.checkpoint) and makes it ready to generate.

    engine_dir: built artifacts; precision: fp32 or bf16; device: cpu or cuda; None lets the machine decide. decoder:
    another autoencoder with the same latents; schedule: see engines.sampler.angles_for.
    Raises CheckpointError, BackendError.
    """
    reasons: dict[str, str] = {}
    backend = _backend(backend, engine_dir, reasons)
    place = _device(device, reasons)
    precision = _precision(precision, place, reasons)
    dtype, execute = PRECISIONS[precision], BACKENDS[backend]
    checkpoint = open_checkpoint(model, decoder)
    limits = _limits(checkpoint, max_batch)

    settings, config = checkpoint.settings, checkpoint.transformer
    instruction = INSTRUCTION if settings.instruction else ""
    tokenizer = PromptTokenizer(checkpoint.load_tokenizer(), instruction, settings.max_prompt_tokens)
    encoder = TextEncoder(checkpoint.load_text_body(dtype, place), tokenizer.prefix)
    transformer = checkpoint.load_transformer(dtype, place)
    autoencoder = checkpoint.load_autoencoder(dtype, place)
    modules = Modules(
        TextStage(tokenizer, encoder, EmbeddingCache()),
        execute(transformer, ModuleSpec("transformer", dtype, place, max_batch)),
        execute(PixelDecoder(autoencoder), ModuleSpec("decoder", dtype, place, max_batch)),
        execute(PixelEncoder(autoencoder), ModuleSpec("encoder", dtype, place, max_batch)),
    )
    compression = checkpoint.autoencoder.compression
    space = LatentSpace(config.in_channels, compression, config.guidance_embeds_scale, dtype, place)
    info = EngineInfo(
        checkpoint=model,
        backend=backend,
        precision=precision,
        device=_device_name(place),
        versions={name: version(name) for name in ("torch", "transformers", "tokenizers")},
        reasons=reasons,
        guidance_trained=settings.guidance_trained,
        max_prompt_tokens=settings.max_prompt_tokens,
    )
    return SprintEngine(modules, space, info, limits, schedule)


def _backend(asked: str, engine_dir: str | None, reasons: dict[str, str]) -> str:
    if engine_dir is not None:
        raise BackendError(f"engine: got {engine_dir!r}, and no backend of {', '.join(BACKENDS)} runs built artifacts")
    if asked == "auto":
        reasons["backend"] = "eager: the one that runs everywhere; no built engine was given"
        return "eager"
    if asked not in BACKENDS:
        raise BackendError(f"backend: got {asked!r}, allowed auto, {', '.join(BACKENDS)}")
    reasons["backend"] = f"{asked}: asked for"
    return asked


def _device(asked: str | None, reasons: dict[str, str]) -> torch.device:
    if asked is None:
        found = torch.cuda.is_available()
        reasons["device"] = "cuda: a GPU is present" if found else "cpu: torch sees no GPU"
        return torch.device("cuda" if found else "cpu")
    kind, _, index = asked.partition(":")
    if kind not in ("cpu", "cuda") or not (index or "0").isdecimal():
        raise BackendError(f"device: got {asked!r}, allowed cpu, cuda, cuda:<index>")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise BackendError(f"device: got {asked!r}, but torch sees {torch.cuda.device_count()} GPUs; use cpu")
    reasons["device"] = f"{asked}: asked for"
    return torch.device(asked)


def _precision(asked: str | None, device: torch.device, reasons: dict[str, str]) -> str:
    if asked is None:
        chosen = "fp32" if device.type == "cpu" else "bf16"
        reasons["precision"] = f"{chosen}: " + (
            "exact, and the CPU's default" if chosen == "fp32" else "as Sprint was trained"
        )
        return chosen
    if asked not in PRECISIONS:
        raise BackendError(f"precision: got {asked!r}, allowed {', '.join(PRECISIONS)}")
    reasons["precision"] = f"{asked}: asked for"
    return asked


def _device_name(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else f"{device} ({torch.cuda.get_device_name(device)})"


def _limits(checkpoint: Checkpoint, max_batch: int) -> Limits:
    """Sides up to twice the size that the checkpoint was trained at; beyond it pictures repeat themselves."""
    settings = checkpoint.settings
    width, height = settings.default_size
    limits = Limits(
        max_batch=max_batch,
        default_size=settings.default_size,
        sizes=settings.sizes,
        multiple=math.lcm(32, checkpoint.autoencoder.compression),
        max_side=2 * max(width, height),
        max_pixels=4 * width * height,
        conditioning=frozenset({"text", "image"}),
    )
    if not limits.allows_size(width, height):
        raise CheckpointError(
            f"{checkpoint.name}: sprint.json: default_size {width}x{height} is not among its sizes, or no multiple of "
            f"{limits.multiple}"
        )
    return limits
