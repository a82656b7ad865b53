"""The middle of a gated block (engines.models.layers.GLUMBConv) in C, and the rounding of rows to 8 bits.

gated_depthwise.c applies SiLU, the depthwise convolution and the gate in one pass; its result may be rounded, and its
input may be the unscaled sums of a product in 8 bits (engines.backends.cpu.int8_products).

Shapes: [1, 2C, H, W] to [1, C, h, W], channels-last in memory.
"""

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.backends.cpu.kernels.layout import Edges, pixel_rows
from engines.backends.cpu.kernels.library import Library

Rounded = tuple[Tensor, Tensor]  # uint8 [rows, in]: round(x / scale) + 128; scales [rows, 1] in the dtype of x

_GATED_POINTERS = ("x", "scale", "before", "weights", "bias", "y", "scales")
_GATED_SIZES = ("height_in", "height", "width", "channels")
_GATED_OPTIONS = ("above", "bf16", "silu", "threads")


class _Gated(ctypes.Structure):
    """The arguments of `gated_depthwise`, as struct gated in gated_depthwise.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _GATED_POINTERS),
        *((name, ctypes.c_int64) for name in _GATED_SIZES),
        *((name, ctypes.c_int32) for name in _GATED_OPTIONS),
    )


class _Rows(ctypes.Structure):
    """The arguments of `round_rows`, as struct rows."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "levels", "scales")),
        *((name, ctypes.c_int64) for name in ("count", "length")),
        *((name, ctypes.c_int32) for name in ("bf16", "threads")),
    )


class GatedDepthwise:
    """A depthwise 3x3 convolution of 2C channels, and its first half times the SiLU of its second.

    silu: applied to the input first.
    """

    def __init__(self, library: Library, conv: nn.Conv2d, *, silu: bool) -> None:
        self._library, self._silu, self._channels = library, silu, len(conv.weight) // 2
        self._weights = conv.weight.detach().flatten(1).t().float().contiguous()
        self._bias = torch.zeros(len(conv.weight)) if conv.bias is None else conv.bias.detach().float()

    def __call__(self, x: Tensor, edges: Edges = (1, 1)) -> Tensor:
        """Returns [1, C, h, W]."""
        _, _, height, width = x.shape
        size = (1, self._channels, height + sum(edges) - 2, width)
        y = torch.empty(size, dtype=x.dtype, memory_format=torch.channels_last)
        self._run(x, edges, y=y)
        return y

    def rounded(self, x: Tensor, scale: Tensor, before: Tensor) -> Rounded:
        """Returns the result for x * scale + before, rounded. scale: of each pixel, in the dtype of x; before [2C]."""
        rows = x.shape[2] * x.shape[3]
        levels, scales = torch.empty((rows, self._channels), dtype=torch.uint8), x.new_empty((rows, 1))
        assert scale.numel() == rows
        assert scale.dtype == x.dtype
        assert before.dtype == torch.float32
        self._run(x, (1, 1), y=levels, scale=scale.contiguous(), before=before, scales=scales)
        return levels, scales

    def _run(self, x: Tensor, edges: Edges, **tensors: Tensor) -> None:
        assert x.shape[:2] == (1, 2 * self._channels)
        assert pixel_rows(x).is_contiguous()
        call = _Gated(
            x=x.data_ptr(),
            weights=self._weights.data_ptr(),
            bias=self._bias.data_ptr(),
            height_in=x.shape[2],
            height=x.shape[2] + sum(edges) - 2,
            width=x.shape[3],
            channels=self._channels,
            above=edges[0],
            bf16=x.dtype == torch.bfloat16,
            silu=self._silu,
            threads=torch.get_num_threads(),
            **{name: tensor.data_ptr() for name, tensor in tensors.items()},
        )
        self._library.run("gated_depthwise", call)


def computes(conv: nn.Module, library: Library) -> bool:
    """Returns whether a GatedDepthwise can take the place of a convolution and its gate."""
    if not isinstance(conv, nn.Conv2d) or conv.kernel_size != (3, 3) or conv.padding != (1, 1):
        return False
    depthwise = conv.groups == conv.in_channels == conv.out_channels
    return depthwise and conv.out_channels % (2 * library.lanes) == 0


def rounded_rows(x: Tensor, library: Library) -> Rounded:
    """Rounds the rows of x [..., in]; `in` is a multiple of the library's lanes."""
    x = x.reshape(-1, x.shape[-1]).contiguous()
    levels, scales = torch.empty(x.shape, dtype=torch.uint8), x.new_empty((len(x), 1))
    call = _Rows(
        x=x.data_ptr(),
        levels=levels.data_ptr(),
        scales=scales.data_ptr(),
        count=len(x),
        length=x.shape[1],
        bf16=x.dtype == torch.bfloat16,
        threads=torch.get_num_threads(),
    )
    library.run("round_rows", call)
    return levels, scales


def computes_right(library: Library) -> bool:
    """Returns whether a small image equals PyTorch's modules."""
    channels, generator = library.lanes, torch.Generator().manual_seed(0)
    conv = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, groups=2 * channels).requires_grad_(False)
    conv.weight.copy_(torch.randn(conv.weight.shape, generator=generator))
    x = torch.randn((1, 2 * channels, 5, 6), generator=generator).contiguous(memory_format=torch.channels_last)
    value, gate = conv(F.silu(x)).chunk(2, dim=1)
    expected = pixel_rows(value * F.silu(gate))
    gated = GatedDepthwise(library, conv, silu=True)
    y = torch.full_like(x[:, :channels], float("nan"))
    gated._run(x, (1, 1), y=y)
    if not torch.allclose(pixel_rows(y), expected, rtol=0, atol=1e-4):
        return False
    levels, scales = gated.rounded(x, torch.ones(30), torch.zeros(2 * channels))
    return torch.allclose((levels.float() - 128) * scales, expected, rtol=0, atol=float(scales.max()) * 0.51)
