"""The backend of our own kernels (engines.kernels) on an NVIDIA GPU, whose graphs `--backend cuda-graph` captures."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engines.backends.base import ModuleSpec
from engines.backends.cuda.adapted import CudaAdapted
from engines.backends.cuda.blocks import FP8_PRODUCTS
from engines.backends.cuda.controlled import CudaControlled
from engines.backends.cuda.decoder import CudaDecoder, unsupported_decoder
from engines.backends.cuda.encoder import CudaEncoder, unsupported_encoder
from engines.backends.cuda.proof import compare, proof_file
from engines.backends.cuda.text import CudaTextEncoder
from engines.backends.cuda.transformer import CudaTransformer
from engines.backends.eager import to_channels_last
from engines.checkpoints.checkpoint import Checkpoint
from engines.device.hardware import expanded
from engines.kernels.cache_keys import stable_cache_keys
from engines.kernels.launch_code import load_compiled_module
from engines.kernels.op import Launcher, Ops, sqnr_db
from engines.models.controlnet import ControlledTransformer
from engines.models.dcae import AutoencoderConfig
from engines.models.lora import AdaptedTransformer
from engines.models.pixels import PixelDecoder, PixelEncoder
from engines.models.text_encoder import TextEncoder
from engines.models.transformer import SprintTransformer
from engines.pipeline.calibration import calibration_prompts
from engines.pipeline.denoise_decode import Denoise
from engines.pipeline.text_stage import TextStage
from engines.sampler import angles_for, flow_time, job_noise

# Module -> rows of the largest values in calibration, which decide the scales of 8 bits. Empty: nothing is in 8 bits.
Ranges = Mapping[str, Sequence[Sequence[float]]]

_STEPS = (1, 1, 1, 4)  # of calibration prompts in turn: one step is what most requests take
# Of the velocity to itself in bf16 with one product of all blocks in 8 bits. Errors add, and with all five the gate is
# 25 dB (engines.backends.parity): a product of 26 would take four fifths of them. Random weights have 31 to 41.
PRODUCT_SQNR_DB = 26.0


class NativeBackend:
    """A backend (engines.backends.base) whose modules share one set of operations.

    reasons: module -> reason why PyTorch runs it. product_sqnr_db: product of a block -> SQNR of the velocity with it
    alone in 8 bits, measured by `to_fp8`.
    """

    def __init__(self, ops: Ops, autoencoder: AutoencoderConfig, proof: Path | None = None):
        """proof: file of the kernels that equal their references on this GPU (engines.backends.cuda.proof)."""
        self.ops, self.reasons, self._proof = ops, dict[str, str](), proof
        self.product_sqnr_db = dict[str, float]()
        self._encoder_reason = unsupported_encoder(autoencoder)
        self._text: CudaTextEncoder | None = None
        self._transformer: CudaTransformer | None = None
        self._decoder: CudaDecoder | None = None

    @classmethod
    def on(cls, device: torch.device, autoencoder: AutoencoderConfig, cache: Path, shapes: str) -> "NativeBackend":
        """Returns the backend for a GPU; its kernels have the keys with which another process compiled them.

        cache: folder of proofs; a user without a home directory gets no proof. shapes: of the kernels' inputs, as
        engines.pipeline.limits.shapes_of tells them.
        """
        stable_cache_keys()
        load_compiled_module()
        folder = expanded(cache)
        proof = None if folder is None else proof_file(folder, device, shapes)
        return cls(Ops(Launcher.of(device)), autoencoder, proof)

    def __call__(self, module: nn.Module, spec: ModuleSpec) -> Callable[..., Any]:
        if isinstance(module, AdaptedTransformer):
            inner = self(module.module, spec)
            assert isinstance(inner, CudaTransformer | CudaControlled)
            return CudaAdapted(inner, module.active_adapters)
        if isinstance(module, SprintTransformer):
            self._transformer = CudaTransformer(module, self.ops)
            return self._transformer
        if isinstance(module, ControlledTransformer):
            assert self._transformer is not None
            return CudaControlled(module, self.ops, self._transformer)
        if isinstance(module, PixelDecoder):
            reason = "a TAESANA" if module.config is None else unsupported_decoder(module.config)
            if reason is None:
                decoder = CudaDecoder(module, self.ops)
                self._decoder = decoder if spec.name == "decoder" else self._decoder
                return decoder
            self.reasons[spec.name] = f"PyTorch's modules: {reason}"
        if isinstance(module, PixelEncoder):
            if self._encoder_reason is None:
                return CudaEncoder(module, self.ops)
            self.reasons["encoder"] = f"PyTorch's modules: {self._encoder_reason}"
        return to_channels_last(module, spec)

    def text(self, stage: TextStage) -> TextStage:
        """Returns the text stage with an encoder of our kernels, or `stage` if they cannot run it."""
        assert isinstance(stage.encoder, TextEncoder)
        try:
            self._text = encoder = CudaTextEncoder(stage.encoder, self.ops)
        except ValueError as error:
            self.reasons["text"] = f"PyTorch's modules: {error}"
            return stage
        return TextStage(stage.tokenizer, encoder)

    @torch.inference_mode()
    def to_fp8(self, checkpoint: Checkpoint, text: TextStage, size: tuple[int, int], device: torch.device) -> None:
        """Quantises text encoder, transformer and decoder to fp8, with scales from runs of the calibration prompts.

        A product of the blocks that is below PRODUCT_SQNR_DB alone stays in bf16, as does a decoder or text encoder
        that PyTorch runs. size: (width, height) in pixels.
        """
        transformer, decoder = self._transformer, self._decoder
        assert transformer is not None
        config = checkpoint.transformer
        width, height = (side // checkpoint.autoencoder.compression for side in size)
        shape = (config.in_channels, height, width)
        guidance = sum(checkpoint.settings.guidance_trained) / 2 * config.guidance_embeds_scale
        texts = calibration_prompts(checkpoint, text)
        denoise = Denoise(transformer, transformer.dtype)
        transformer.blocks.calibrates = True
        for index in range(texts.states.shape[0]):
            row, steps = slice(index, index + 1), _STEPS[index % len(_STEPS)]
            inputs = {
                "noise": job_noise(index, shape, steps)[:, None],
                "angles": torch.tensor(angles_for(steps, one_step=checkpoint.settings.one_step_angle))[:, None],
                "guidance": torch.tensor([guidance]),
                "text": texts.states[row].to(transformer.dtype),
                "text_mask": texts.mask[row],
            }
            [latent] = denoise({name: value.to(device) for name, value in inputs.items()})
            if decoder is not None:
                decoder.calibrate(latent)
        transformer.blocks.calibrates = False
        self.leave_out(transformer, {name: value.to(device) for name, value in inputs.items()})
        self.quantise({})

    def leave_out(self, transformer: CudaTransformer, inputs: Mapping[str, Tensor]) -> None:
        """Measures each product of the blocks in 8 bits alone, and leaves those in bf16 that miss PRODUCT_SQNR_DB."""
        guidance, angle = inputs["guidance"], inputs["angles"][0]
        latent, text, mask = inputs["noise"][0].to(transformer.dtype), inputs["text"], inputs["text_mask"]
        exact = transformer(latent, text, flow_time(angle), guidance, mask)
        for product in FP8_PRODUCTS:
            with transformer.blocks.one_in_fp8(product):
                found = transformer(latent, text, flow_time(angle), guidance, mask)
            self.product_sqnr_db[product] = round(sqnr_db(exact, found), 1)
            if not self.product_sqnr_db[product] >= PRODUCT_SQNR_DB:
                transformer.blocks.leave_in_bf16(product)
        bad = [f"{name}, {db} dB" for name, db in self.product_sqnr_db.items() if not db >= PRODUCT_SQNR_DB]
        if bad:
            self.reasons["fp8"] = f"left in bf16, since alone they miss {PRODUCT_SQNR_DB:g} dB: {'; '.join(bad)}"

    @property
    def ranges(self) -> Ranges:
        """The ranges of the modules that `quantise` converts."""
        assert self._transformer is not None
        decoder = {} if self._decoder is None else {"decoder": self._decoder.ranges}
        return {"transformer": self._transformer.blocks.ranges, **decoder}

    def quantise(self, ranges: Ranges) -> None:
        """Converts our modules to 8 bits, with scales from their ranges and `ranges` of another calibration."""
        assert self._transformer is not None
        if "transformer" in ranges:
            self._transformer.blocks.include_ranges(ranges["transformer"])
        self._transformer.to_fp8()
        if self._decoder is not None:
            if "decoder" in ranges:
                self._decoder.include_ranges(ranges["decoder"])
            self._decoder.to_fp8()
        if self._text is not None:
            self._text.to_fp8()

    @property
    def replaced(self) -> Mapping[str, str]:
        """Returns kernel -> reason why its reference runs instead."""
        return self.ops.replaced

    def compare(self, work: Callable[[], object]) -> None:
        """Runs `work` and compares each kernel with its reference; `reasons` names the replaced ones."""
        replaced = compare(self.ops, work, self._proof)
        text = "; ".join(f"{name}: {why}" for name, why in sorted(replaced.items()))
        self.reasons["kernels"] = f"replaced by their references: {text}" if replaced else "all equal their references"
