"""Finds, reads and checks a SANA-Sprint checkpoint, and loads its modules.

The name of a checkpoint is a folder in the diffusers layout, a hub id (`org/name` or `org/name@revision`), a short name
of SHORT_NAMES, or `random:<size>[:<seed>]` for seeded random weights at full size. A mismatch is a CheckpointError of
one line: the value got and the value needed. An optional `sprint.json` holds our own fields; see SprintConfig.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from engines.checkpoints.hub import SHORT_NAMES, find_folder
from engines.checkpoints.random_weights import RandomWeights
from engines.checkpoints.weights import Component, FolderWeights, WeightSource, meta_init, read_json
from engines.errors import CheckpointError
from engines.models.dcae import DC_AE_LITE, Autoencoder, AutoencoderConfig
from engines.models.gemma import GemmaBody, GemmaConfig
from engines.models.pixels import PixelDecoder
from engines.models.taesana import TaesanaConfig, TaesanaDecoder
from engines.models.transformer import SPRINT_0_6B, SPRINT_1_6B, SprintTransformer, TransformerConfig
from engines.sampler import ONE_STEP_ANGLE

RANDOM_SIZES = {"sprint-0.6b": SPRINT_0_6B, "sprint-1.6b": SPRINT_1_6B}
DECODERS = {"lite": "mit-han-lab/dc-ae-lite-f32c32-sana-1.1-diffusers"}  # short names of --decoder
PIPELINES = ("SanaSprintPipeline", "SanaSprintImg2ImgPipeline")

_PARTS: tuple[Component, ...] = ("transformer", "vae", "text_encoder")


@dataclass(frozen=True)
class SprintConfig:
    """Fields of `sprint.json`. Published checkpoints have none and use the defaults. Sizes are (width, height)."""

    instruction: bool = True
    max_prompt_tokens: int = 300
    default_size: tuple[int, int] = (1024, 1024)
    guidance_trained: tuple[float, float] = (4.0, 5.0)
    sizes: tuple[tuple[int, int], ...] = ()
    one_step_angle: float = ONE_STEP_ANGLE  # radians; the sampler starts there if it has one step

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SprintConfig":
        """Raises ValueError for a key that is unknown or of the wrong form."""
        checks: dict[str, Callable[[Any], bool]] = {
            "instruction": lambda v: isinstance(v, bool),
            "max_prompt_tokens": lambda v: type(v) is int and v >= 2,
            "default_size": _is_size,
            "guidance_trained": lambda v: _is_pair(v, (int, float)),
            "sizes": lambda v: isinstance(v, list) and all(map(_is_size, v)),
            "one_step_angle": lambda v: type(v) in (int, float) and 0 < v <= ONE_STEP_ANGLE,
        }
        for key, value in values.items():
            if key not in checks:
                raise ValueError(f"unknown key {key!r}; known are {', '.join(checks)}")
            if not checks[key](value):
                raise ValueError(f"{key}: got {value!r}, like {getattr(cls(), key)!r} is needed")
        return cls(**{key: _frozen(value) for key, value in values.items()})


def _is_pair(value: object, types: tuple[type, ...]) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(v, types) for v in value)


def _is_size(value: object) -> bool:
    return _is_pair(value, (int,)) and all(side > 0 for side in value)  # type: ignore[attr-defined]  # a pair


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint with read and matching configs. The load_ methods read the weights."""

    name: str
    settings: SprintConfig
    transformer: TransformerConfig
    autoencoder: AutoencoderConfig
    text: Mapping[str, object] = field(repr=False)  # text_encoder/config.json
    weights: WeightSource
    taesana: TaesanaConfig | None = None  # set: decodes in place of the autoencoder's decoder
    decoder: str = "full"  # value of --decoder

    def __post_init__(self) -> None:
        """Raises CheckpointError if two components do not fit."""
        latents, channels = self.autoencoder.latent_channels, self.transformer.in_channels
        if not channels == self.transformer.out_channels == latents:
            raise CheckpointError(
                f"{self.name}: the transformer has {channels} channels in, {self.transformer.out_channels} out, and "
                f"the autoencoder {latents}; all must agree"
            )
        if self.text.get("hidden_size") != self.transformer.caption_channels:
            raise CheckpointError(
                f"{self.name}: the text encoder's hidden_size is {self.text.get('hidden_size')}, the transformer's "
                f"caption_channels {self.transformer.caption_channels}; they must agree"
            )
        if not self.transformer.guidance_embeds:
            raise CheckpointError(
                f"{self.name}: a base Sana transformer (guidance_embeds is false); a SANA-Sprint checkpoint is needed, "
                f"such as {', '.join(SHORT_NAMES)}"
            )

    def load_transformer(self, dtype: torch.dtype, device: torch.device) -> SprintTransformer:
        with meta_init():
            module = SprintTransformer(self.transformer)
        self.weights.load_into("transformer", module, dtype, device)
        return module.eval()

    def load_autoencoder(self, dtype: torch.dtype, device: torch.device) -> Autoencoder:
        """Returns encoder and decoder; the encoder alone if a TAESANA decodes in place of the decoder."""
        with meta_init():
            module = Autoencoder(self.autoencoder, None if self.taesana is None else "encoder")
        if self.taesana is None:
            self.weights.load_into("vae", module, dtype, device)
        else:
            self.weights.load_into("vae.encoder", module.encoder, dtype, device)
        return module.eval()

    def load_pixel_decoder(
        self, autoencoder: Autoencoder | None, dtype: torch.dtype, device: torch.device
    ) -> PixelDecoder:
        """Returns the decoder of `autoencoder` (None: reads it alone), or the TAESANA in its place."""
        if self.taesana is not None:
            with meta_init():
                module = TaesanaDecoder(self.taesana)
            self.weights.load_into("decoder", module, dtype, device)
            return PixelDecoder(module.eval())
        if autoencoder is None:
            with meta_init():
                autoencoder = Autoencoder(self.autoencoder, "decoder")
            self.weights.load_into("vae.decoder", autoencoder.decoder, dtype, device)
        return PixelDecoder(autoencoder.eval())

    def load_text_body(self, dtype: torch.dtype, device: torch.device) -> GemmaBody:
        """Returns the Gemma-2 body for models.text_encoder.TextEncoder."""
        try:
            config = GemmaConfig.from_dict(self.text)
        except ValueError as error:
            raise CheckpointError(f"{self.name}: text_encoder/config.json: {error}") from error
        with meta_init():
            module = GemmaBody(config)
        self.weights.load_into("text_encoder", module, dtype, device)
        return module.eval()

    def load_tokenizer(self) -> Tokenizer:
        """Raises CheckpointError, also if it has more tokens than the text encoder's vocabulary."""
        tokenizer = self.weights.tokenizer()
        size, known = tokenizer.get_vocab_size(), self.text.get("vocab_size", 256000)
        if not isinstance(known, int) or size > known:
            raise CheckpointError(
                f"{self.name}: the tokenizer has {size} tokens, the text encoder's vocab_size is {known}"
            )
        return tokenizer


def open_checkpoint(name: str | Checkpoint, decoder: str | None = None, variant: str | None = None) -> Checkpoint:
    """Finds the checkpoint `name`, downloads it from the hub if needed, and reads its configs.

    Takes an open checkpoint as it is. decoder: full (the checkpoint's own), lite (DC-AE-Lite), taesana (the
    checkpoint's folder of that name), a folder or hub id of one of these, or the published taesana_decoder.pth.
    variant: of the weights, if a component has several (engines.checkpoints.variants). Raises CheckpointError.
    """
    if isinstance(name, Checkpoint):
        checkpoint = name
    else:
        is_random = name.startswith("random:")
        checkpoint = _random(name) if is_random else _from_folder(name, find_folder(name, None, variant), variant)
    if decoder is None or decoder == "full":
        return checkpoint
    return replace(_with_decoder(checkpoint, decoder, variant), decoder=decoder)


def open_fast_decoder(checkpoint: Checkpoint, decoder: str, variant: str | None = None) -> Checkpoint:
    """Returns the checkpoint with the decoder of --fast-decoder, a name as for `open_checkpoint`.

    Raises CheckpointError.
    """
    if decoder in ("full", checkpoint.decoder):
        raise CheckpointError(f"fast_decoder: got {decoder}, another one than the first is needed, such as lite")
    return open_checkpoint(checkpoint, decoder, variant)


def _with_decoder(checkpoint: Checkpoint, decoder: str, variant: str | None) -> Checkpoint:
    """Replaces the autoencoder, or its decoder by a TAESANA. Raises CheckpointError."""
    if not isinstance(checkpoint.weights, FolderWeights):
        if decoder not in ("lite", "taesana"):
            raise CheckpointError(f"decoder: got {decoder!r}; with random weights full, lite or taesana is allowed")
        source = checkpoint.weights
        source = replace(source, decoder=decoder) if isinstance(source, RandomWeights) else source
        if decoder == "lite":
            return replace(checkpoint, autoencoder=DC_AE_LITE, taesana=None, weights=source)
        return _with_taesana(checkpoint, TaesanaConfig(), source)
    folders = checkpoint.weights.folders
    own = folders["transformer"].parent / "taesana"  # vae may be another decoder's
    if decoder == "taesana" and not own.is_dir():
        raise CheckpointError(
            f"decoder: got taesana, and {own} does not exist; give the path of taesana_decoder.pth from the repository "
            "madebyollin/taesd, or of a folder with a decoder and its config.json"
        )
    if decoder.endswith(".pth"):
        weights = FolderWeights({**folders, "decoder": Path(decoder)}, checkpoint.weights.variant)
        return _with_taesana(checkpoint, TaesanaConfig(), weights)
    folder = own if decoder == "taesana" else find_folder(DECODERS.get(decoder, decoder), "vae", variant)
    folder = folder / "vae" if (folder / "vae").is_dir() else folder
    config = read_json(folder / "config.json")
    if config.get("_class_name") == TaesanaDecoder.__name__:
        weights = FolderWeights({**folders, "decoder": folder}, checkpoint.weights.variant)
        return _with_taesana(checkpoint, TaesanaConfig.from_dict(config), weights)
    autoencoder = _autoencoder(folder)
    if autoencoder.compression != checkpoint.autoencoder.compression:
        raise _other_latents(checkpoint, "an AutoencoderDC", autoencoder)
    own_parts = {part: path for part, path in folders.items() if part != "decoder"}
    weights = FolderWeights({**own_parts, "vae": folder}, variant)
    return replace(checkpoint, autoencoder=autoencoder, taesana=None, weights=weights)


def _with_taesana(checkpoint: Checkpoint, config: TaesanaConfig, weights: WeightSource) -> Checkpoint:
    needed = checkpoint.autoencoder
    if (config.latent_channels, config.compression) != (needed.latent_channels, needed.compression):
        raise _other_latents(checkpoint, "a TAESANA", config)
    return replace(checkpoint, taesana=config, weights=weights)


def _other_latents(checkpoint: Checkpoint, kind: str, config: TaesanaConfig | AutoencoderConfig) -> CheckpointError:
    needed = checkpoint.autoencoder
    return CheckpointError(
        f"decoder: {kind} for latents of {config.latent_channels} channels and {config.compression} pixels a side; the "
        f"checkpoint has {needed.latent_channels} and {needed.compression}"
    )


def _random(name: str) -> Checkpoint:
    size, _, seed = name.removeprefix("random:").partition(":")
    if size not in RANDOM_SIZES or not (seed or "0").isdecimal():
        allowed = ", ".join(f"random:{known}" for known in RANDOM_SIZES)
        raise CheckpointError(f"model: got {name!r}, allowed {allowed}, each with an optional :<seed>")
    config = RANDOM_SIZES[size]
    text = {"model_type": "gemma2", "hidden_size": config.caption_channels}  # the defaults are Gemma-2 2B
    return Checkpoint(name, SprintConfig(), config, AutoencoderConfig(), text, RandomWeights(int(seed or "0")))


def _from_folder(name: str, folder: Path, variant: str | None = None) -> Checkpoint:
    pipeline = read_json(folder / "model_index.json").get("_class_name")
    if pipeline not in PIPELINES:
        raise CheckpointError(f"{folder}: holds a {pipeline}; a {PIPELINES[0]} checkpoint is needed")
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    if scheduler.get("_class_name") != "SCMScheduler" or scheduler.get("prediction_type", "trigflow") != "trigflow":
        described = f"{scheduler.get('_class_name')} ({scheduler.get('prediction_type')})"
        raise CheckpointError(
            f"{folder}: its scheduler is {described}; SCMScheduler (trigflow) is what Sprint is trained for"
        )
    try:
        transformer = TransformerConfig.from_dict(read_json(folder / "transformer" / "config.json"))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder}: transformer/config.json: {error}") from error
    try:
        extra = folder / "sprint.json"
        settings = SprintConfig.from_dict(read_json(extra)) if extra.exists() else SprintConfig()
    except ValueError as error:
        raise CheckpointError(f"{extra}: {error}") from error
    text = read_json(folder / "text_encoder" / "config.json")
    weights = FolderWeights({part: folder / part for part in (*_PARTS, "tokenizer")}, variant)
    if variant is not None and variant not in weights.variants():
        raise CheckpointError(f"{folder}: --variant: got {variant}, and no part has files of that name; leave it out")
    return Checkpoint(name, settings, transformer, _autoencoder(folder / "vae"), text, weights)


def _autoencoder(folder: Path) -> AutoencoderConfig:
    config = read_json(folder / "config.json")
    if config.get("_class_name") != "AutoencoderDC":
        raise CheckpointError(f"{folder}: holds a {config.get('_class_name')}; an AutoencoderDC is needed")
    return AutoencoderConfig.from_dict(config)
