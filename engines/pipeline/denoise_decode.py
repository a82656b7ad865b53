"""Denoise, and decode: each one call on tensors of fixed shapes, which a CUDA graph can hold whole.

Nothing in them waits for the device, brings a value to the host or makes a tensor of one. Inputs by name, for B jobs:

    noise          [steps, B, C, h, w]  the sample at the first angle, then the noise of each further step; fp32
    angles         [steps, B]           radians, falling; fp32
    guidance       [B]                  times guidance_embeds_scale; fp32
    text           [B, T, D]            in the transformer's type
    text_mask      [B, T]               bool; absent where nothing is padded
    lora_index     [B, S] int64, lora_scale [B, S] fp32    engines.models.lora.AdapterSelection; absent without adapters
    control        [B, C, h, w]         the drawing's latent, in the transformer's type; control_scale [B], fp32

and of the decoder: latent [B, C, h, w], fp32.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from engines.backends.cuda.graphs import InputSpec
from engines.models.lora import AdapterSelection
from engines.sampler import Denoiser, sample

Inputs = Mapping[str, Tensor]


@runtime_checkable
class ReadsTextOnce(Protocol):
    """A transformer whose work on the text is done once for all steps."""

    def __call__(self, *args: Any) -> Tensor: ...

    def denoiser(
        self, text: Tensor, text_mask: Tensor | None, guidance: Tensor, *drawing: Tensor, **chosen: AdapterSelection
    ) -> Denoiser: ...


class Denoise:
    """Through `transformer`, executed by its backend: gives the latent [B, C, h, w], fp32."""

    def __init__(self, transformer: Callable[..., Tensor], dtype: torch.dtype):
        self._transformer, self._dtype = transformer, dtype

    def __call__(self, inputs: Inputs) -> tuple[Tensor, ...]:
        text, guidance, mask = inputs["text"], inputs["guidance"], inputs.get("text_mask")
        drawing = [inputs["control"], inputs["control_scale"]] if "control" in inputs else []
        noise, chosen = inputs["noise"], dict[str, AdapterSelection]()
        if "lora_index" in inputs:
            chosen["chosen"] = AdapterSelection(inputs["lora_index"], inputs["lora_scale"])

        def velocity(x: Tensor, flow_time: Tensor) -> Tensor:
            return self._transformer(x.to(self._dtype), text, flow_time, guidance, mask, *drawing, **chosen)

        denoiser: Denoiser = velocity
        if isinstance(self._transformer, ReadsTextOnce):
            denoiser = self._transformer.denoiser(text, mask, guidance, *drawing, **chosen)
        return (sample(denoiser, noise[0], inputs["angles"], noise[1:]),)


class Decode:
    """Through `decoder`, executed by its backend: gives pixels and finite (PixelDecoder)."""

    def __init__(self, decoder: Callable[..., Any]):
        self._decoder = decoder

    def __call__(self, inputs: Inputs) -> tuple[Tensor, ...]:
        pixels, finite = self._decoder(inputs["latent"])
        return pixels, finite


def input_specs(
    channels: int, tokens: int, text_width: int, dtype: torch.dtype, *, drawing: bool, adapters: int = 0
) -> dict[str, InputSpec]:
    """The chain's inputs with text padded to `tokens`; drawing: with those of a drawing; adapters: that a job may ask
    for at once."""
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
    if adapters:
        specs["lora_index"] = InputSpec(torch.int64, lambda key: (key.bucket, adapters))
        specs["lora_scale"] = InputSpec(torch.float32, lambda key: (key.bucket, adapters))
    return specs


def latent_spec(channels: int) -> dict[str, InputSpec]:
    """The decoder's input."""
    return {"latent": InputSpec(torch.float32, lambda key: (key.bucket, channels, key.height, key.width))}
