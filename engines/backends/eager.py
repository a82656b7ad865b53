"""Backend that runs modules eagerly in PyTorch: any shape, any batch, no preparation beyond the layout of weights.

On a CPU engines.backends.cpu.decoder replaces the decoder, and engines.backends.cpu.transformer_block the blocks of the
transformer, both in 8 bits if the spec asks for it. There, and in bf16 and 8 bits without a C library, the transformer
runs job by job, so that an image is the same in any batch.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from engines.backends.base import ModuleSpec
from engines.backends.cpu.decoder import CpuDecoder
from engines.backends.cpu.fastest_steps import FastestSteps
from engines.backends.cpu.int8 import has_int8
from engines.backends.cpu.int8_products import convert, faster_in_8_bits, int8_products
from engines.backends.cpu.kernels.checked import load_library
from engines.backends.cpu.kernels.library import Library
from engines.backends.cpu.onednn_steps import BY_ROWS, DIRECT, IN_8_BITS, OneDnnSteps
from engines.backends.cpu.packed_linear import ProductFactory, exact_products, has_onednn
from engines.backends.cpu.steps import Steps
from engines.backends.cpu.tiled_steps import TiledSteps, attention_factory, gate_factory
from engines.backends.cpu.timings import Timings
from engines.backends.cpu.transformer_block import replace_blocks
from engines.backends.parity import INT8_GATE, difference
from engines.device.memory import return_freed_memory
from engines.errors import BackendError
from engines.models.controlnet import ControlNet
from engines.models.dcae import Decoder
from engines.models.folding import fold
from engines.models.lora import AdapterSelection
from engines.models.pixels import PixelDecoder
from engines.models.transformer import SprintTransformer, TransformerConfig

_WIDE = 256  # channels; in narrower decoders calls dominate: packing costs 0.2 ms, which only steps in C gain
_PROBE = (8, 8)  # cells of the noise latent on which a module in 8 bits must pass its gate
_PROBE_TOKENS = 20


def eager(module: nn.Module, spec: ModuleSpec) -> nn.Module:
    """Returns a module that computes as `module`; replaces decoders, and what runs in 8 bits.

    On a CPU it consumes `module`: weights in another layout take the place of its own. Raises BackendError without
    8-bit products, ParityError if a module in 8 bits misses its gate.
    """
    replaced = _replaced(module, spec)
    if spec.device.type == "cpu":
        return_freed_memory()
    return replaced


def _replaced(module: nn.Module, spec: ModuleSpec) -> nn.Module:
    if spec.int8 and (spec.device.type != "cpu" or not has_int8()):
        raise BackendError("precision: int8 needs a CPU with 8-bit products (AVX512-VNNI) and oneDNN; use bf16")
    decoder = module.dcae if isinstance(module, PixelDecoder) else None
    if spec.int8 and isinstance(module, PixelDecoder):
        if decoder is not None:
            return _with_int8_convolutions(module, decoder, spec)
        spec.reasons[spec.name] = f"{spec.dtype}: a TAESANA has no convolutions in 8 bits"
    elif spec.int8 and _gains_from_int8(module, spec):
        return _with_int8_products(module, spec)
    on_cpu = spec.device.type == "cpu"
    if on_cpu and decoder is not None and _gains_from_packing(decoder, spec):
        steps = _steps(spec, "direct", DIRECT, {"winograd by rows": BY_ROWS})
        module.decoder = CpuDecoder(decoder, steps)
        if steps.reason:
            spec.reasons[spec.name] = steps.reason
        return module
    if on_cpu and spec.name in ("transformer", "controlled"):
        replaced = _replace_blocks(module, spec, lambda _: exact_products(spec.dtype))
        return PerJobTransformer(module) if replaced or spec.dtype == torch.bfloat16 else module
    return to_channels_last(module, spec)


def _config_of(module: nn.Module) -> TransformerConfig:
    return next(part.config for part in module.modules() if isinstance(part, SprintTransformer))


def _replace_blocks(module: nn.Module, spec: ModuleSpec, products: Callable[[Library], ProductFactory]) -> bool:
    """Runs a transformer's blocks in C between their products. Returns whether it could."""
    library = load_library(spec.cache)
    return library is not None and replace_blocks(module, library, products(library))


def _gains_from_int8(module: nn.Module, spec: ModuleSpec) -> bool:
    gains, times = faster_in_8_bits(_config_of(module), spec.dtype, Timings(spec.cache))
    if not gains:
        spec.reasons[spec.name] = f"no products in 8 bits, which gain little on this CPU: {times}"
    return gains


def _with_int8_products(module: nn.Module, spec: ModuleSpec) -> nn.Module:
    """Converts the transformer in `module`, and the ControlNet if it has one; returns it job by job."""
    run = PerJobTransformer(module)
    parts = [part for part in module.modules() if isinstance(part, SprintTransformer | ControlNet)]
    config = _config_of(module)
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn((1, *shape), generator=generator).to(spec.dtype)

    text, half = noise(_PROBE_TOKENS, config.caption_channels), torch.tensor([0.5], dtype=spec.dtype)
    inputs = [noise(config.in_channels, *_PROBE), text, half, half]
    if len(parts) > 1:
        inputs += [noise(1, 1).new_ones(text.shape[:2]), noise(config.in_channels, *_PROBE), torch.ones_like(half)]
    with torch.inference_mode():
        expected = run(*inputs)
        if not _replace_blocks(module, spec, int8_products):
            convert(block for part in parts for block in part.transformer_blocks)
        actual = run(*inputs)
    kept = INT8_GATE.check(f"{spec.name} in int8", difference(expected, actual))
    spec.reasons[spec.name] = f"products of image tokens in 8 bits, {kept}"
    return run


def _steps(spec: ModuleSpec, name: str, onednn: OneDnnSteps, others: dict[str, Steps]) -> FastestSteps:
    """Returns what builds the steps of a decoder, with the C library if there is one."""
    library = load_library(spec.cache)
    if library is not None:
        onednn = replace(onednn, gate=gate_factory(library), attention=attention_factory(library))
        others = {**others, "winograd by tiles": TiledSteps(library)}
    return FastestSteps(spec.cache, name, onednn, others)


def _with_int8_convolutions(module: PixelDecoder, decoder: Decoder, spec: ModuleSpec) -> PixelDecoder:
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn((1, decoder.conv_in.in_channels, *_PROBE), generator=generator)
    with torch.inference_mode():
        expected, _ = module(latent)
        steps = _steps(spec, "8 bits", IN_8_BITS, {})
        module.decoder = CpuDecoder(decoder, steps)
        actual, _ = module(latent)
    kept = INT8_GATE.check("decoder in int8", difference(expected, actual))
    spec.reasons[spec.name] = "; ".join(filter(None, (steps.reason, str(kept))))
    return module


def to_channels_last(module: nn.Module, spec: ModuleSpec) -> nn.Module:
    """Converts an autoencoder module to channels-last and folds its upsampling; returns transformers unchanged."""
    if spec.name in ("transformer", "controlled"):
        return module
    if isinstance(module, PixelDecoder) and module.dcae is not None:
        fold(module.dcae)
    converted: nn.Module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in stubs
    return converted


def _gains_from_packing(decoder: Decoder, spec: ModuleSpec) -> bool:
    """Returns whether packed steps are faster and oneDNN computes in the dtype on this CPU."""
    wide = decoder.conv_in.weight.shape[0] >= _WIDE
    return has_onednn(spec.dtype) and (wide or load_library(spec.cache) is not None)


class PerJobTransformer(nn.Module):
    """Runs a transformer for one job at a time, with that job's unpadded text.

    In bf16 on a CPU the order of sums in cross-attention depends on the padding of texts: a longer prompt in the batch
    would change pixels by up to 26/255. Where a sum is rounded to 8 bits afterwards, its last bit may decide as well.
    One job occupies a core as fully as eight do.
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
        """chosen: only for an engines.models.lora.AdaptedTransformer."""
        rows = []
        for index in range(latent.shape[0]):
            row = slice(index, index + 1)
            length = text.shape[1] if text_mask is None else int(text_mask[index].sum())
            row_control = [value[row] for value in control]
            row_chosen = {} if chosen is None else {"chosen": AdapterSelection(chosen.indices[row], chosen.scale[row])}
            arguments = (latent[row], text[row, :length], timestep[row], guidance[row], None, *row_control)
            rows.append(self.module(*arguments, **row_chosen))
        return torch.cat(rows)
