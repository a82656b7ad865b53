"""Memory that an engine will take, told before it is loaded: weights from file headers, and an estimate of activations.

The estimate: four times the largest activation of the decoder, for one image of the largest served size. bench.budget
counts that much for the published decoder at 1024x1024. Images are decoded one by one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from engines.artifacts.manifest import NATIVE, Manifest, read_manifest
from engines.backends.choice import choose_device, default_precision
from engines.checkpoints.checkpoint import Checkpoint, open_fast_decoder
from engines.checkpoints.controlnet import controlnet_folder
from engines.checkpoints.fingerprint import equal_text_encoders
from engines.checkpoints.lora import with_adapters
from engines.checkpoints.parameters import count_numbers, count_parameters
from engines.checkpoints.weights import Component
from engines.device.memory import available_bytes
from engines.models.lora import count_stacks
from engines.types import AdapterOption

TENSORS_AT_ONCE = 4  # of the size of the decoder's largest activation


@dataclass(frozen=True)
class PlannedEngine:
    """One engine of a server, by the options of engines.loader.load_engine."""

    checkpoint: Checkpoint
    engine_dir: str | None = None
    fast_decoder: str | None = None
    controlnet: str | None = None
    variant: str | None = None
    lora: Sequence[AdapterOption] = ()


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes of one engine. `text` is 0 if an earlier engine holds an equal text encoder."""

    name: str
    text: int
    modules: int  # transformer and autoencoder, or built engines
    activations: int
    fast_decoder: int = 0  # in PyTorch; a built one is one of the modules
    controlnet: int = 0
    adapters: int = 0  # stacks from which requests choose; a fused adapter takes nothing

    @property
    def weights(self) -> int:
        return self.text + self.modules + self.fast_decoder + self.controlnet + self.adapters

    @property
    def line(self) -> str:
        text = _gb(self.text) if self.text else "shared with an earlier model"
        parts = {"second decoder": self.fast_decoder, "ControlNet": self.controlnet, "adapters": self.adapters}
        beside = "".join(f"{name} {_gb(size)}, " for name, size in parts.items() if size)
        return (
            f"{self.name}: text encoder {text}, transformer and autoencoder {_gb(self.modules)}, {beside}"
            f"activations about {_gb(self.activations)}"
        )


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of all engines of a server, and what their device has left (None: it does not tell)."""

    needs: tuple[MemoryNeed, ...]
    device: str
    available: int | None

    @property
    def total(self) -> int:
        """All weights, and activations: on a CPU of one engine, as one runs at a time; on a GPU graphs keep theirs."""
        activations = [need.activations for need in self.needs]
        return sum(need.weights for need in self.needs) + (max if self.device == "cpu" else sum)(activations)

    @property
    def fits(self) -> bool:
        return self.available is None or self.total <= self.available

    @property
    def lines(self) -> list[str]:
        """One sentence for each engine, and one for all."""
        return [*(need.line for need in self.needs), self.summary]

    @property
    def summary(self) -> str:
        names = ", ".join(need.name for need in self.needs)
        has = "an unknown amount" if self.available is None else _gb(self.available)
        return f"{names} need about {_gb(self.total)}, {self.device} has {has} left"


def planned_memory(engines: Sequence[PlannedEngine], *, device: str | None, precision: str | None) -> MemoryPlan:
    """Returns what the engines will take: PyTorch's, or the built ones of a folder.

    device, precision: as for engines.loader.load_engine. Raises CheckpointError, ArtifactError, BackendError.
    """
    chosen = choose_device(device, {})
    dtype = torch.float32 if (precision or default_precision(chosen)) == "fp32" else torch.bfloat16
    needs: list[MemoryNeed] = []
    for index, engine in enumerate(engines):
        is_shared = any(equal_text_encoders(earlier.checkpoint, engine.checkpoint) for earlier in engines[:index])
        needs.append(_need(engine, dtype, text_is_shared=is_shared))
    return MemoryPlan(tuple(needs), str(chosen), available_bytes(chosen))


def _need(engine: PlannedEngine, dtype: torch.dtype, *, text_is_shared: bool) -> MemoryNeed:
    checkpoint = engine.checkpoint
    manifest = None if engine.engine_dir is None else read_manifest(Path(engine.engine_dir))
    fast = None
    if engine.fast_decoder is not None:
        fast = open_fast_decoder(checkpoint, engine.fast_decoder, engine.variant)

    def counted(owner: Checkpoint, *parts: Component) -> int:
        return sum(count_parameters(owner, part) for part in parts) * dtype.itemsize

    if manifest is None:
        has_own = checkpoint.taesana is None  # otherwise a TAESANA decodes, and the autoencoder's decoder is not read
        modules = counted(checkpoint, "transformer", *(("vae",) if has_own else ("vae.encoder", "decoder")))
    else:
        modules = _built(manifest, with_fast=fast is not None)
    second = 0
    if fast is not None and (manifest is None or manifest.fast_decoder is None):
        second = counted(fast, "vae.decoder" if fast.taesana is None else "decoder")
    branch, control = controlnet_folder(checkpoint, engine.controlnet, engine.variant), 0
    if branch is not None:
        control = count_numbers(branch, engine.variant) * dtype.itemsize
        if manifest is not None and manifest.vendor != NATIVE:
            control += counted(checkpoint, "transformer")  # PyTorch's, beside the built one
    _, selectable = with_adapters(checkpoint, engine.lora, {})
    return MemoryNeed(
        checkpoint.name,
        0 if text_is_shared else counted(checkpoint, "text_encoder"),
        modules,
        max(_activations(owner, dtype) for owner in (checkpoint, fast) if owner is not None),
        fast_decoder=second,
        controlnet=control,
        adapters=count_stacks([adapter.factors for adapter in selectable]) * dtype.itemsize,
    )


def _built(manifest: Manifest, *, with_fast: bool) -> int:
    """Returns the bytes of the built files that a start reads; the text encoder counts apart."""
    left_out = ("text",) if with_fast else ("text", "fast_decoder")
    files = {*manifest.shared, *(file for artifact in manifest.artifacts for file in artifact.files)}
    return sum(file.bytes for file in files if not file.name.startswith(left_out))


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _activations(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    width, height = max(
        checkpoint.settings.sizes or (checkpoint.settings.default_size,), key=lambda size: math.prod(size)
    )
    config = checkpoint.autoencoder
    stages = zip(config.decoder_block_out_channels, config.decoder_layers_per_block, strict=True)
    values: list[int] = [
        channels * width * height // 4**level for level, (channels, layers) in enumerate(stages) if layers
    ]
    return int(TENSORS_AT_ONCE * max(values) * dtype.itemsize)
