"""3x3 convolutions on a CPU by Winograd's filtering of 4x4 pixels, in C, with what follows them in the decoder.

winograd_4x4.c has the algorithm: a quarter of the products, whose transforms stay in a core's cache. In bf16 one
keeps 39 dB, as with 8 bits or with engines.backends.cpu.winograd. Without bf16 products, it multiplies in fp32.

Shapes: [1, C, H, W], channels-last in memory; C and D are multiples of a panel of channels.
"""

import ctypes
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engines.backends.cpu.kernels.layout import Edges, pixel_rows
from engines.backends.cpu.kernels.library import Library

POINTS = 36
A, B = 3 / 2, 2 / 3  # points; those of winograd_4x4.c
_POINTERS = ("x", "y", "weights", "bias", "norm", "used")
_SIZES = ("height_in", "height", "width", "in", "out")
_OPTIONS = ("above", "bf16", "silu", "phases", "stride", "threads")


class _Call(ctypes.Structure):
    """The arguments of `winograd`, as struct call in winograd_4x4.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, ctypes.c_int32) for name in _OPTIONS),
        ("eps", ctypes.c_float),
    )


@dataclass(frozen=True)
class Norm:
    """An RMSNorm over the channels: weight and bias [2, D] in fp32."""

    weight_and_bias: Tensor
    eps: float


class TiledConv:
    """A convolution of stride 1 and padding 1 from [1, C, H, W], fp32 or bf16, and what follows it.

    weight [D, C, 3, 3]; bias [D] or None.
    """

    def __init__(self, library: Library, weight: Tensor, bias: Tensor | None, *, silu: bool = False) -> None:
        self._library, self._silu, self._dtype = library, silu, weight.dtype
        self._weights, self._used = _at_points(weight, library.panel, _product_dtype(library, weight.dtype))
        self._bias = torch.zeros(len(weight)) if bias is None else bias.detach().float()
        self._in, self._out = weight.shape[1], weight.shape[0]

    def __call__(self, x: Tensor, out: Tensor, edges: Edges = (1, 1)) -> None:
        """Writes to `out` [1, D, h, W]. x [1, C, H, W] has the rows of `out` and a neighbour where no edge is."""
        self._run(x, out, edges)

    def add_norm(self, x: Tensor, out: Tensor, norm: Norm, edges: Edges = (1, 1)) -> None:
        """Adds the norm of the result to `out`."""
        self._run(x, out, edges, norm=norm)

    def upsample(self, x: Tensor, out: Tensor, repeats: int, edges: Edges = (1, 1)) -> None:
        """Writes four phases, D / 4 channels each, to the pixels of `out` [1, D / 4, 2h, 2W].

        repeats: of the shortcut (engines.models.folding.shortcuts_of), 0, 2 or 4.
        """
        self._run(x, out, edges, phases=4, stride=4 // repeats if repeats else 0)

    def _run(
        self, x: Tensor, out: Tensor, edges: Edges, *, norm: Norm | None = None, phases: int = 1, stride: int = 0
    ) -> None:
        above, below = edges
        height, width = x.shape[2] + above + below - 2, x.shape[3]
        scale = 2 if phases == 4 else 1
        assert x.dtype == out.dtype == self._dtype
        assert x.shape[:2] == (1, self._in)
        assert out.shape == (1, self._out // phases, scale * height, scale * width)
        assert all(pixel_rows(image).is_contiguous() for image in (x, out))
        call = _Call(
            x=x.data_ptr(),
            y=out.data_ptr(),
            weights=self._weights.data_ptr(),
            bias=self._bias.data_ptr(),
            norm=None if norm is None else norm.weight_and_bias.data_ptr(),
            used=self._used.data_ptr(),
            height_in=x.shape[2],
            height=height,
            width=width,
            out=self._out,
            above=above,
            bf16=x.dtype == torch.bfloat16,
            silu=self._silu,
            phases=phases,
            stride=stride,
            threads=torch.get_num_threads(),
            eps=0.0 if norm is None else norm.eps,
            **{"in": self._in},
        )
        self._library.run("winograd", call)


def computes_right(library: Library) -> bool:
    """Returns whether a small convolution equals PyTorch's."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((1, library.panel, 6, 7), generator=generator).contiguous(memory_format=torch.channels_last)
    weight = torch.randn((library.panel, library.panel, 3, 3), generator=generator) / library.panel
    out = torch.full_like(x, float("nan"))
    TiledConv(library, weight, None, silu=True)(x, out)
    return torch.allclose(out, F.silu(F.conv2d(x, weight, padding=1)), rtol=0, atol=1e-4)


def _product_dtype(library: Library, dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if dtype == torch.bfloat16 and library.bf16_products else torch.float32


def _at_points(weight: Tensor, panel: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns the kernels [D, C, 3, 3] at the points, in the layout of winograd_4x4.c, and a bit for each used one.

    A point whose kernels are all zero in a panel is left out: the folded ones of an upsampling have such.
    """
    pair = 2 if dtype == torch.bfloat16 else 1
    bits, ordered = torch.zeros(len(weight) // panel, dtype=torch.int64), list[Tensor]()
    for index, kernels in enumerate(
        torch.split(weight.detach(), panel)
    ):  # one by one: all in fp64 would be 16 times as large
        rows = at_points(kernels.double(), 2)  # [6, panel, C, 3]
        at = at_points(rows, 3).transpose(0, 1).flatten(0, 1)  # [36, panel, C]
        used = at.abs().amax((1, 2)) > 0
        bits[index] = (used.long() << torch.arange(POINTS)).sum()
        ordered.append(
            torch.unflatten(at[used], 2, (-1, pair)).transpose(1, 2).to(dtype)
        )  # [used, C / pair, panel, pair]
    return torch.cat(ordered), bits


def at_points(kernels: Tensor, dim: int) -> Tensor:
    """Evaluates kernels, polynomials of the three numbers along `dim`, at 0, A, -A, B, -B and infinity: six of them."""
    first, middle, last = kernels.unbind(dim)
    values = [first]
    for point, other in ((A, B), (B, A)):
        scale = 2 * point**2 * (point**2 - other**2)
        values += [(first + signed * middle + point**2 * last) / scale for signed in (point, -point)]
    return torch.stack([*values, last])
