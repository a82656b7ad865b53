"""Denoise and decode as one call on tensors of fixed shapes, which a CUDA graph can hold whole.

Nothing in it waits for the device, brings a value to the host or makes a tensor of one. Its inputs by name, for B jobs:

    noise          [steps, B, C, h, w]  the sample at the first angle, then the noise of each further step; fp32
    angles         [steps, B]           radians, falling; fp32
    guidance       [B]                  times guidance_embeds_scale; fp32
    text           [B, T, D]            in the transformer's type
    text_mask      [B, T]               bool; absent where nothing is padded
    control        [B, C, h, w]         the drawing's latent, in the transformer's type; control_scale [B], fp32
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from engines.backends.cuda.graphs import InputSpec
from engines.sampler import sample

Inputs = Mapping[str, Tensor]


class DenoiseDecode:
    """Through `transformer` and `decoder`, each executed by its backend; gives pixels and finite (PixelDecoder)."""

    def __init__(self, transformer: Callable[..., Tensor], decoder: Callable[..., Any], dtype: torch.dtype):
        self._transformer, self._decoder, self._dtype = transformer, decoder, dtype

    def __call__(self, inputs: Inputs, lap: Callable[[], object]) -> tuple[Tensor, Tensor]:
        """`lap` is called between denoise and decode."""
        text, guidance, mask = inputs["text"], inputs["guidance"], inputs.get("text_mask")
        drawing = [inputs["control"], inputs["control_scale"]] if "control" in inputs else []

        def velocity(x: Tensor, flow_time: Tensor) -> Tensor:
            return self._transformer(x.to(self._dtype), text, flow_time, guidance, mask, *drawing)

        noise = inputs["noise"]
        latent = sample(velocity, noise[0], inputs["angles"], noise[1:])
        lap()
        pixels, finite = self._decoder(latent)
        return pixels, finite


def input_specs(
    channels: int, tokens: int, text_width: int, dtype: torch.dtype, *, drawing: bool
) -> dict[str, InputSpec]:
    """The chain's inputs with text padded to `tokens`; drawing: with those of a drawing."""
    specs = {
        "noise": InputSpec(torch.float32, lambda key: (key.steps, key.bucket, channels, key.height, key.width), 1),
        "angles": InputSpec(torch.float32, lambda key: (key.steps, key.bucket), 1),
        "guidance": InputSpec(torch.float32, lambda key: (key.bucket,)),
        "text": InputSpec(dtype, lambda key: (key.bucket, tokens, text_width)),
        "text_mask": InputSpec(torch.bool, lambda key: (key.bucket, tokens)),
    }
    if drawing:
        specs["control"] = InputSpec(dtype, lambda key: (key.bucket, channels, key.height, key.width))
        specs["control_scale"] = InputSpec(torch.float32, lambda key: (key.bucket,))
    return specs
