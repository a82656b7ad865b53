"""The denoise stage and the decode stage: each is one call on tensors of fixed shapes, which a CUDA graph can hold.

They never wait for the device or exchange a value with the host. Inputs of denoise by name, for B jobs:

    noise          [steps, B, C, h, w]  sample at the first angle, then noise of each further step; fp32
    angles         [steps, B]           radians, falling; fp32
    guidance       [B]                  times guidance_embeds_scale; fp32
    text           [B, T, D]            in the transformer's dtype
    text_mask      [B, T]               bool; absent without padding
    lora_index     [B, S] int64, lora_scale [B, S] fp32    engines.models.lora.AdapterSelection; absent without adapters
    control        [B, C, h, w]         latent of the drawing, in the transformer's dtype; control_scale [B], fp32

Input of decode: latent [B, C, h, w], fp32.
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
    """A transformer that processes the text once for all steps."""

    def __call__(self, *args: Any) -> Tensor: ...

    def denoiser(
        self, text: Tensor, text_mask: Tensor | None, guidance: Tensor, *drawing: Tensor, **chosen: AdapterSelection
    ) -> Denoiser: ...


class Denoise:
    """Runs the sampler on `transformer`. Returns the latent [B, C, h, w], fp32."""

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
    """Runs `decoder`. Returns pixels and finite (engines.models.pixels.PixelDecoder)."""

    def __init__(self, decoder: Callable[..., Any]):
        self._decoder = decoder

    def __call__(self, inputs: Inputs) -> tuple[Tensor, ...]:
        pixels, finite = self._decoder(inputs["latent"])
        return pixels, finite


def input_specs(
    channels: int, tokens: int, text_width: int, dtype: torch.dtype, *, drawing: bool, adapters: int = 0
) -> dict[str, InputSpec]:
    """Returns the inputs of Denoise, with text padded to `tokens`.

    drawing: with those of a drawing. adapters: largest number of a job.
    """
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
    """Returns the input of Decode."""
    return {"latent": InputSpec(torch.float32, lambda key: (key.bucket, channels, key.height, key.width))}
