"""A gate and the rounding of rows in C equal PyTorch's operations."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.backends.cpu import int8_products
from engines.backends.cpu.kernels.checked import load_library
from engines.backends.cpu.kernels.gated_depthwise import GatedDepthwise, computes, rounded_rows
from engines.backends.cpu.kernels.library import Library
from engines.backends.cpu.onednn_steps import PackedGate
from engines.backends.cpu.tiled_steps import gate_factory
from engines.backends.parity import difference


def depthwise(channels: int, bias: bool = True) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=bias).requires_grad_(False)


def image(channels: int, height: int, width: int, count: int = 1) -> Tensor:
    values = torch.randn(count, channels, height, width, generator=torch.Generator().manual_seed(1))
    return values.contiguous(memory_format=torch.channels_last)


def gated(conv: nn.Conv2d, x: Tensor) -> Tensor:
    value, gate = conv(x).chunk(2, dim=1)
    return value * F.silu(gate)


# 144 channels are two runs of those that are computed together, and a shorter one with any instructions.
@pytest.mark.parametrize("size", [(1, 1), (3, 7), (9, 4), (19, 2)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
def test_equals_pytorchs_operations(
    library: Library, size: tuple[int, int], bias: bool, silu: bool, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    conv, x = depthwise(288, bias), image(288, *size)
    actual = GatedDepthwise(library, conv, silu=silu)(x)
    assert actual.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(actual, gated(conv, F.silu(x) if silu else x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("edges", [(0, 0), (1, 0), (0, 1)], ids=str)
def test_a_strip_with_its_neighbours_gives_its_own_rows(library: Library, edges: tuple[int, int]) -> None:
    conv, x = depthwise(64), image(64, 7, 5)
    gate = gate_factory(library)(conv)
    assert isinstance(gate, GatedDepthwise)
    whole = gated(conv, F.pad(x, (0, 0, *edges)))[:, :, 1:-1]
    torch.testing.assert_close(gate(x, edges), whole, rtol=0, atol=1e-5)


def test_in_bf16_it_is_nearer_than_pytorchs_operations(library: Library) -> None:
    conv, x = depthwise(64).bfloat16(), image(64, 8, 8).bfloat16()
    exact = gated(depthwise(64).bfloat16().double(), F.silu(x.double()))
    actual = difference(exact, GatedDepthwise(library, conv, silu=True)(x)).sqnr_db
    assert actual > 50
    assert actual > difference(exact, gated(conv, F.silu(x))).sqnr_db


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(5, 6), (17, 3)], ids=str)
def test_scales_its_input_and_rounds_its_result(library: Library, dtype: torch.dtype, size: tuple[int, int]) -> None:
    conv, x = depthwise(96).to(dtype), image(96, *size).to(dtype)
    scale, before = torch.rand(size[0] * size[1], 1).to(dtype), torch.randn(96)
    scaled = x.double() * scale.double().view(1, 1, *size) + before.double().view(1, -1, 1, 1)
    exact = gated(depthwise(96).to(dtype).double(), F.silu(scaled)).permute(0, 2, 3, 1).flatten(0, 2)
    levels, scales = GatedDepthwise(library, conv, silu=True).rounded(x, scale, before)
    assert scales.dtype == dtype
    error = ((levels.double() - 128) * scales.double() - exact).abs()
    assert (error <= scales.double() * (0.501 if dtype == torch.float32 else 1.1)).all()  # bf16: of 127 levels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounds_rows_as_pytorch_does(library: Library, dtype: torch.dtype) -> None:
    x = torch.randn(37, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    x[3] = 0
    x[4, 5] = -1000
    x[5, 6] = float("nan")
    expected, actual = int8_products.rounded_rows(x), rounded_rows(x, library)
    finite = [row for row in range(37) if row != 5]
    assert ((expected[0].int() - actual[0].int()).abs()[finite] <= 1).all()  # x / scale is x times its inverse here
    nonzero = [row for row in finite if row != 3]
    torch.testing.assert_close(actual[1][nonzero], expected[1][nonzero], rtol=2**-8, atol=0)
    assert (actual[0][3] == 128).all()
    assert actual[1][5].isnan()


def test_offers_only_what_it_computes(library: Library) -> None:
    assert computes(depthwise(64), library)
    odd = depthwise(2 * library.lanes + 4)
    assert not computes(odd, library)
    assert isinstance(gate_factory(library)(odd), PackedGate)
    assert not computes(nn.Conv2d(64, 64, 3, padding=1), library)
    assert not computes(nn.Conv2d(64, 64, 5, padding=2, groups=64), library)


def test_the_library_of_this_cpu_is_loaded_once(tmp_path: Path) -> None:
    assert load_library(tmp_path) is load_library(tmp_path)
