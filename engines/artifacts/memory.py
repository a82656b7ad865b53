"""Memory that an engine will take, told before it is loaded: weights from file headers, and an estimate of activations.

The estimate: four times the largest activation of the decoder, for one image of the largest served size. bench.budget
counts that much for the published decoder at 1024x1024. Images are decoded one by one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from engines.artifacts.manifest import read_manifest
from engines.backends.choice import choose_device, default_precision
from engines.checkpoints.checkpoint import Checkpoint
from engines.checkpoints.fingerprint import equal_text_encoders
from engines.checkpoints.parameters import count_parameters
from engines.checkpoints.weights import Component
from engines.device.memory import available_bytes

TENSORS_AT_ONCE = 4  # of the size of the decoder's largest activation


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes of one engine. `text` is 0 if an earlier engine holds an equal text encoder."""

    name: str
    text: int
    modules: int  # transformer and autoencoder, or built engines
    activations: int

    @property
    def weights(self) -> int:
        return self.text + self.modules


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
        shared = "shared with an earlier model"
        return [
            *(
                f"{need.name}: text encoder {_gb(need.text) if need.text else shared}, transformer and autoencoder "
                f"{_gb(need.modules)}, activations about {_gb(need.activations)}"
                for need in self.needs
            ),
            self.summary,
        ]

    @property
    def summary(self) -> str:
        names = ", ".join(need.name for need in self.needs)
        has = "an unknown amount" if self.available is None else _gb(self.available)
        return f"{names} need about {_gb(self.total)}, {self.device} has {has} left"


def planned_memory(
    checkpoints: Sequence[Checkpoint],
    engine_dirs: Sequence[str | None],
    *,
    device: str | None,
    precision: str | None,
) -> MemoryPlan:
    """Returns what the engines of checkpoints will take: PyTorch's, or the built ones of a folder.

    device, precision: as for engines.loader.load_engine. Raises CheckpointError, ArtifactError, BackendError.
    """
    chosen = choose_device(device, {})
    dtype = torch.float32 if (precision or default_precision(chosen)) == "fp32" else torch.bfloat16
    needs = []
    for index, (checkpoint, folder) in enumerate(zip(checkpoints, engine_dirs, strict=True)):
        is_shared = any(equal_text_encoders(earlier, checkpoint) for earlier in checkpoints[:index])
        text = 0 if is_shared else count_parameters(checkpoint, "text_encoder") * dtype.itemsize
        if folder is None:
            parts: tuple[Component, ...] = ("transformer", "vae")
            modules = sum(count_parameters(checkpoint, part) for part in parts) * dtype.itemsize
        else:
            manifest = read_manifest(Path(folder))
            files = {*manifest.shared, *(file for artifact in manifest.artifacts for file in artifact.files)}
            modules = sum(file.bytes for file in files if not file.name.startswith("text"))
        needs.append(MemoryNeed(checkpoint.name, text, modules, _activations(checkpoint, dtype)))
    return MemoryPlan(tuple(needs), str(chosen), available_bytes(chosen))


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
