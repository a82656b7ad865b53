"""fp8 (E4M3, per tensor) quantisation of the transformer: rules by layer, and scales calibrated on real prompts.

A scale is the largest value of a quantised input or weight (max calibration). The graph holds the scales as explicit
QuantizeLinear and DequantizeLinear pairs, so that every runtime computes the same. Sources: NVIDIA ModelOpt (method);
the tables of SGLang and TensorRT's demo/Diffusion for other transformers (choice of layers).
"""

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn

from engines.backends.parity import difference
from engines.backends.quiet import quiet
from engines.errors import BuildError
from engines.pipeline.calibration import CalibrationPrompts
from engines.sampler import angles_for, job_noise, sample

LARGEST = 448.0  # of E4M3


@dataclass(frozen=True)
class LayerRule:
    """A rule for the layers whose names match `pattern`. `fp8`: quantise their inputs and weights."""

    pattern: str
    fp8: bool
    reason: str


# The first pattern that matches decides. A layer that no pattern matches is an error.
FP8_RULES = (
    LayerRule(
        "transformer_blocks.*.attn?.to_[qkv]", True, "large products; their input is normed or the residual stream"
    ),
    LayerRule(
        "transformer_blocks.*.attn1.to_out.0",
        False,
        "40 % of all the error at the published size (29 dB alone, the next 32) for 7 % of the arithmetic",
    ),
    LayerRule("transformer_blocks.*.attn2.to_out.0", True, "large product; its input is an average, without outliers"),
    LayerRule("transformer_blocks.*.ff.conv_inverted", True, "the largest product of a block"),
    LayerRule("transformer_blocks.*.ff.conv_point", True, "the second largest product of a block"),
    LayerRule(
        "transformer_blocks.*.ff.conv_depth",
        False,
        "depthwise: bound by memory, nine products per value, no fp8 kernel",
    ),
    LayerRule("patch_embed.*", False, "first layer: its error reaches everything, and it is 0.1 % of the arithmetic"),
    LayerRule("time_embed.*", False, "once per image, not per token; every block's gates hang on it"),
    LayerRule("caption_projection.*", False, "once per prompt; text states have outlier channels"),
    LayerRule("proj_out", False, "last layer: its error is the image's own, and it is 0.1 % of the arithmetic"),
)


def rule_for(name: str) -> LayerRule:
    """Returns the rule for one layer. Raises BuildError without one."""
    for rule in FP8_RULES:
        if fnmatch.fnmatchcase(name, rule.pattern):
            return rule
    raise BuildError(f"quantize: no row of engines.build.quantization.FP8_RULES decides about {name!r}")


def quantised_layers(module: nn.Module) -> list[str]:
    """Returns the names of the layers that FP8_RULES quantises."""
    layers = (name for name, part in module.named_modules() if isinstance(part, nn.Linear | nn.Conv2d))
    return [name for name in layers if rule_for(name).fp8]


def quantize(
    module: nn.Module, texts: CalibrationPrompts, sizes: Sequence[tuple[int, int]], steps: Sequence[int], channels: int
) -> nn.Module:
    """Returns `module` (a SprintTransformer) with fp8 quantisers, calibrated by runs of the sampler.

    sizes: (height, width) of the latent. steps: numbers of steps that will run, as their angles decide the inputs.
    Raises BuildError for a missing package.
    """
    mtq = _modelopt()
    layers = quantised_layers(module)
    settings: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for name in layers:
        for quantizer in ("input_quantizer", "weight_quantizer"):
            settings.append({"quantizer_name": f"{name}.{quantizer}", "cfg": {"num_bits": (4, 3), "axis": None}})

    def loop(model: nn.Module) -> None:
        run_calibration(model, texts, sizes, steps, channels)

    silent = redirect_stdout(StringIO())  # ModelOpt prints its progress, but stdout is for the manifest
    with quiet(), silent, torch.inference_mode(mode=False), torch.no_grad():
        quantised: nn.Module = mtq.quantize(module, {"quant_cfg": settings, "algorithm": "max"}, forward_loop=loop)
    return quantised


def cast_to(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Casts weights and scales of a quantised `module` to `dtype`, which is that of its graph, and returns it.

    The calibration runs in fp32: a CPU without fp16 arithmetic takes 14 s for one pointwise convolution of the 0.6B
    transformer in fp16, and 0.2 s in fp32. Other buffers keep their dtype.
    """
    scales = (value for name, value in module.named_buffers() if name.endswith("_amax"))
    with torch.inference_mode(mode=False):
        for value in (*module.parameters(), *scales):
            value.data = value.data.to(dtype)
    return module


def run_calibration(
    model: nn.Module, texts: CalibrationPrompts, sizes: Sequence[tuple[int, int]], steps: Sequence[int], channels: int
) -> list[Tensor]:
    """Runs each prompt through the sampler at each size, the numbers of steps in turn. Returns the clean latents."""
    like, latents = next(model.parameters()), []
    for height, width in sizes:
        for seed, (states, mask) in enumerate(zip(texts.states, texts.mask, strict=True)):
            count = steps[seed % len(steps)]
            noise = job_noise(seed, (channels, height, width), count)[:, None].to(like.device)

            def velocity(x: Tensor, time: Tensor, states: Tensor = states, mask: Tensor = mask) -> Tensor:
                guidance = torch.full_like(time, 0.45)
                text = states[None].to(like)
                predicted: Tensor = model(x.to(like.dtype), text, time, guidance, mask[None].to(like.device))
                return predicted

            latents.append(sample(velocity, noise[0], angles_for(count), noise[1:]))
    return latents


@contextmanager
def onnx_translations() -> Iterator[Mapping[Any, Callable[..., Any]]]:
    """Makes quantised modules exportable within the block. Yields quantisation operator -> its ONNX.

    ModelOpt's own export needs torch's older exporter, which cannot trace a calibrated scale.
    """
    _modelopt()
    from modelopt.torch.quantization.utils import export_torch_mode

    with export_torch_mode():
        yield {torch.ops.tensorrt.quantize_op.default: _translated}


def _translated(value: Any, amax: Any, num_bits: Any, exponent_bits: Any, unsigned: Any, narrow_range: Any) -> Any:
    """Returns QuantizeLinear and DequantizeLinear to and from E4M3, scale = amax / 448, in the dtype of the value."""
    import onnxscript
    from onnx import TensorProto
    from onnx.helper import make_tensor

    del num_bits, exponent_bits, unsigned, narrow_range  # always 8, 4, no, yes, as `quantize` configures
    op: Any = onnxscript.opset20
    zero = op.Constant(value=make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], b"\0", raw=True))
    scale = op.CastLike(op.Div(op.Cast(amax, to=TensorProto.FLOAT), op.Constant(value_float=LARGEST)), value)
    return op.DequantizeLinear(op.QuantizeLinear(value, scale, zero), scale, zero)


def sensitivity(module: nn.Module, run: Callable[[nn.Module], Tensor], reference: Tensor) -> dict[str, float]:
    """Returns layer -> SQNR in dB of `run`'s result against `reference` with that layer alone quantised, worst first.

    run: computes the result from the module, such as the decoded image.
    """
    mtq = _modelopt()
    layers = quantised_layers(module)
    sqnr = {}
    with quiet(), torch.inference_mode():
        mtq.disable_quantizer(module, "*")
        for name in layers:
            mtq.enable_quantizer(module, f"{name}.*")
            mtq.disable_quantizer(module, f"{name}.output_quantizer")
            sqnr[name] = difference(reference, run(module)).sqnr_db
            mtq.disable_quantizer(module, "*")
        for name in layers:
            mtq.enable_quantizer(module, f"{name}.input_quantizer")
            mtq.enable_quantizer(module, f"{name}.weight_quantizer")
    return dict(sorted(sqnr.items(), key=lambda pair: pair[1]))


def _modelopt() -> Any:
    try:
        with quiet():
            import modelopt.torch.quantization as mtq
    except ImportError as error:
        raise BuildError(f"quantize: the package {error.name} is missing; pip install '.[build]'") from error
    return mtq
