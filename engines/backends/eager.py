"""PyTorch as it is: any shape, any batch, no preparation beyond the layout of weights.

On a CPU the decoder's convolutions are packed for oneDNN (engines.backends.cpu.decoder), in 8 bits where that is asked
for, and in bf16 the transformer takes jobs one by one, so that a picture is the same in any batch.
"""

import torch
from torch import Tensor, nn

from engines.backends.base import ModuleSpec
from engines.backends.cpu.decoder import INT8_CONVOLUTIONS, CpuDecoder
from engines.backends.cpu.int8 import has_int8
from engines.backends.parity import INT8_GATE, difference
from engines.errors import BackendError
from engines.models.dcae import Decoder
from engines.models.folding import fold
from engines.models.lora import AdapterSelection
from engines.models.pixels import PixelDecoder

_WIDE = 256  # channels; a narrower decoder is bound by its calls, and a packed one costs 0.2 ms more
_PROBE = (8, 8)  # cells of the latent that 8 bits are held to the gate on; noise, which uses all of a decoder


def eager(module: nn.Module, spec: ModuleSpec) -> nn.Module:
    """A module that computes the same; of a PixelDecoder the decoder is replaced, and its weights with it.

    Raises BackendError, and ParityError where 8 bits cost this decoder more than its gate allows.
    """
    if isinstance(module, PixelDecoder) and spec.int8:
        return _with_int8_convolutions(module, spec)
    if (
        isinstance(module, PixelDecoder)
        and spec.device.type == "cpu"
        and _gains_from_packing(_loaded_decoder(module), spec.dtype)
    ):
        module.decoder = CpuDecoder(_loaded_decoder(module))
        return module
    if spec.name in ("transformer", "controlled") and spec.device.type == "cpu" and spec.dtype == torch.bfloat16:
        return PerJobTransformer(module)
    return to_channels_last(module, spec)


def _with_int8_convolutions(module: PixelDecoder, spec: ModuleSpec) -> PixelDecoder:
    if spec.device.type != "cpu" or not has_int8():
        raise BackendError("precision: int8 needs a CPU with 8-bit products (AVX512-VNNI) and oneDNN; use bf16")
    decoder = _loaded_decoder(module)
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn((1, decoder.conv_in.in_channels, *_PROBE), generator=generator)
    with torch.inference_mode():
        expected, _ = module(latent)
        module.decoder = CpuDecoder(decoder, INT8_CONVOLUTIONS)
        actual, _ = module(latent)
    INT8_GATE.check("decoder in int8", difference(expected, actual))
    return module


def to_channels_last(module: nn.Module, spec: ModuleSpec) -> nn.Module:
    """The autoencoder in channels-last, which convolutions read fastest, its upsampling folded; others as they are."""
    if spec.name in ("transformer", "controlled"):
        return module
    if isinstance(module, PixelDecoder):
        fold(_loaded_decoder(module))
    converted: nn.Module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in stubs
    return converted


def _loaded_decoder(module: PixelDecoder) -> Decoder:
    assert isinstance(module.decoder, Decoder)  # and not prepared before
    return module.decoder


def _gains_from_packing(decoder: Decoder, dtype: torch.dtype) -> bool:
    """Whether packed convolutions are faster, and oneDNN is there and computes in `dtype` on this CPU."""
    if decoder.conv_in.weight.shape[0] < _WIDE or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]  # torch's own
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class PerJobTransformer(nn.Module):
    """A transformer, run for one job at a time, with that job's text alone.

    In bf16 on a CPU the kernels of the cross-attention sum in an order that depends on how far texts are padded, so a
    longer prompt in the same batch would move pixels by up to 26/255. A core is busy with one job as with eight.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(
        self,
        latent: Tensor,
        text: Tensor,
        timestep: Tensor,
        guidance: Tensor,
        text_mask: Tensor | None = None,
        *control: Tensor,
        chosen: AdapterSelection | None = None,
    ) -> Tensor:
        """chosen: for an engines.models.lora.AdaptedTransformer alone."""
        rows = []
        for index in range(latent.shape[0]):
            row = slice(index, index + 1)
            length = text.shape[1] if text_mask is None else int(text_mask[index].sum())
            row_control = [value[row] for value in control]
            row_chosen = {} if chosen is None else {"chosen": AdapterSelection(chosen.indices[row], chosen.scale[row])}
            arguments = (latent[row], text[row, :length], timestep[row], guidance[row], None, *row_control)
            rows.append(self.module(*arguments, **row_chosen))
        return torch.cat(rows)
