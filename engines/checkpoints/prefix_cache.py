"""Keeps what a text encoder makes of the instruction, which takes a CPU ten seconds and more, in a folder."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from engines.checkpoints.weights import WeightSource, file_stamps
from engines.device.hardware import expanded
from engines.models.text_encoder import PrefixState

FOLDER = "prefixes"


@dataclass(frozen=True)
class PrefixCache:
    """The file of one prefix by one text encoder, which is recognised by the sizes and times of its files."""

    path: Path

    @classmethod
    def of(
        cls, weights: WeightSource, prefix: Sequence[int], dtype: torch.dtype, folder: Path | None
    ) -> "PrefixCache | None":
        """Returns None without a folder, for a user without a home, and for weights that are no files."""
        stamps = [stamp for stamp in file_stamps(weights) if str(stamp[0]).startswith("text_encoder/")]
        folder = folder and expanded(folder)
        if folder is None or not stamps:
            return None
        key = json.dumps([stamps, list(prefix), str(dtype), torch.__version__])
        name = f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
        return cls(folder / FOLDER / name)

    def read(self) -> PrefixState | None:
        """Returns None if the file is absent or damaged."""
        try:
            tensors = load_file(self.path)
            layers = (len(tensors) - 1) // 2
            past = [(tensors[f"key.{layer}"], tensors[f"value.{layer}"]) for layer in range(layers)]
            return PrefixState(tensors["first"], past)
        except (OSError, SafetensorError, KeyError):
            return None

    def write(self, state: PrefixState) -> None:
        """Writes the file whole or not at all; a folder that cannot be written is left as it is."""
        tensors = {"first": state.first}
        for layer, (key, value) in enumerate(state.past):
            tensors |= {f"key.{layer}": key, f"value.{layer}": value}
        with contextlib.suppress(OSError, SafetensorError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.path.parent) as folder:
                part = Path(folder) / self.path.name
                save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, part)
                os.replace(part, self.path)
