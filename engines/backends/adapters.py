"""Adapters that replace the modules and run graphs of fixed height, width and text length.

A graph runs one module at one size: it takes named tensors and returns the outputs in order. TensorRT engines, OpenVINO
models and compiled modules are graphs.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from engines.backends.base import ModuleName
from engines.errors import BackendError

HeightWidth = tuple[int, int]  # of the latent in cells, or of the image in pixels


class Graph(Protocol):
    """Runs one module at one size."""

    def __call__(self, inputs: Mapping[str, Tensor]) -> list[Tensor]: ...


class ModuleGraph:
    """Graph that calls a module with keyword arguments."""

    def __init__(self, module: Callable[..., Any]):
        self._module = module

    def __call__(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        outputs = self._module(**inputs)
        return list(outputs) if isinstance(outputs, tuple | list) else [outputs]


GraphLookup = Callable[[HeightWidth], Graph]


def only_built_sizes(graphs: Mapping[HeightWidth, Graph]) -> GraphLookup:
    """Returns a lookup in `graphs` that raises BackendError, with the sizes built, for any other size."""

    def lookup(side: HeightWidth) -> Graph:
        if side not in graphs:
            built = ", ".join(f"{height}x{width}" for height, width in sorted(graphs))
            raise BackendError(f"size: got {side[0]}x{side[1]} (height x width), this engine was built for {built}")
        return graphs[side]

    return lookup


class TransformerAdapter:
    """Replaces SprintTransformer, or ControlledTransformer where `control` is passed.

    Looks graphs up by (h, w) of the latent and pads text to `tokens` positions.
    """

    def __init__(self, graph_at: GraphLookup, tokens: int):
        self._graph_at, self._tokens = graph_at, tokens

    def __call__(
        self,
        latent: Tensor,
        text: Tensor,
        timestep: Tensor,
        guidance: Tensor | None,
        text_mask: Tensor | None = None,
        control: Tensor | None = None,
        control_scale: Tensor | None = None,
    ) -> Tensor:
        missing = self._tokens - text.shape[1]
        if missing < 0:
            raise BackendError(f"text: got {text.shape[1]} tokens, this engine was built for up to {self._tokens}")
        if text_mask is None:
            text_mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        assert guidance is not None
        inputs = {
            "latent": latent,
            "text": F.pad(text, (0, 0, 0, missing)),
            "timestep": timestep,
            "guidance": guidance,
            "text_mask": F.pad(text_mask, (0, missing)),
        }
        if control is not None and control_scale is not None:
            inputs |= {"control": control, "control_scale": control_scale}
        [velocity] = self._graph_at((latent.shape[-2], latent.shape[-1]))(inputs)
        return velocity


class DecoderAdapter:
    """Replaces PixelDecoder; looks graphs up by (h, w) of the latent."""

    def __init__(self, graph_at: GraphLookup):
        self._graph_at = graph_at

    def __call__(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        pixels, finite = self._graph_at((latent.shape[-2], latent.shape[-1]))({"latent": latent})
        return pixels, finite


class EncoderAdapter:
    """Replaces PixelEncoder; looks graphs up by (height, width) of the image."""

    def __init__(self, graph_at: GraphLookup):
        self._graph_at = graph_at

    def __call__(self, pixels: Tensor) -> Tensor:
        [latent] = self._graph_at((pixels.shape[1], pixels.shape[2]))({"pixels": pixels})
        return latent


def adapter_for(
    name: ModuleName, graph_at: GraphLookup, tokens: int
) -> TransformerAdapter | DecoderAdapter | EncoderAdapter:
    """Returns the adapter that replaces module `name`."""
    if name in ("transformer", "controlled"):
        return TransformerAdapter(graph_at, tokens)
    return EncoderAdapter(graph_at) if name == "encoder" else DecoderAdapter(graph_at)


def pad_batch(value: Tensor, batch: int) -> Tensor:
    """Returns `value` [B, ...] with its last row repeated up to `batch` rows, contiguous."""
    missing = batch - value.shape[0]
    filled = torch.cat([value, value[-1:].expand(missing, *value.shape[1:])]) if missing else value
    return filled.contiguous()
