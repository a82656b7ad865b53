"""The gates pass rounding errors only: a transformer that lacks any one of its modules fails them all."""

import pytest
import torch
from random_modules import SHAPE, random_transformer
from torch import Tensor, nn

from engines.backends.parity import GATES, Gate, difference
from engines.build.example_inputs import example_inputs
from engines.errors import ParityError

# Modules of a block that the test replaces by zeros, or bypasses.
ZEROED = ("attn1", "attn2", "ff")
BYPASSED = (
    *("norm1", "norm2", "attn1.norm_q", "attn1.norm_k", "attn2.norm_q", "attn2.norm_k"),
    *("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_out.0", "ff.conv_depth"),
)


class Zero(nn.Module):
    def forward(self, x: Tensor, *_: object) -> Tensor:
        return torch.zeros_like(x)


@pytest.mark.parametrize(("block", "gates"), [(0, ["fp32", "fp16", "bf16", "fp8"]), (1, ["fp32", "fp16", "bf16"])])
@pytest.mark.parametrize("path", [*ZEROED, *BYPASSED])
def test_removing_any_module_of_a_block_fails_the_gates(path: str, block: int, gates: list[str]) -> None:
    """fp8's gate only in the first block: after it, linear attention averages so much that queries hardly matter."""
    module = random_transformer()
    inputs = example_inputs("transformer", SHAPE, 2, torch.float32)
    reference = module(**inputs)
    parent, _, leaf = path.rpartition(".")
    instead = Zero() if path in ZEROED else nn.Identity()
    setattr(module.transformer_blocks[block].get_submodule(parent), leaf, instead)
    measured = difference(reference, module(**inputs))
    for gate in gates:
        with pytest.raises(ParityError, match=path):
            GATES[gate].check(path, measured)


def test_distances_are_those_of_the_definition() -> None:
    measured = difference(torch.tensor([3.0, -4.0]), torch.tensor([3.0, -3.5]))
    assert (measured.max_abs, measured.mean_abs, measured.relative, measured.psnr_db) == (0.5, 0.25, 0.125, None)
    assert measured.sqnr_db == pytest.approx(20.0)
    pixels = difference(torch.tensor([0, 255], dtype=torch.uint8), torch.tensor([0, 0], dtype=torch.uint8))
    assert pixels.psnr_db == pytest.approx(3.0103)
    assert pixels.max_abs == 255


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_fails(bad: float) -> None:
    measured = difference(torch.ones(2), torch.tensor([1.0, bad]))
    for gate in GATES.values():
        with pytest.raises(ParityError, match="too far"):
            gate.check("transformer", measured)


def test_equal_outputs_pass_and_can_be_written() -> None:
    image = torch.full((1, 2, 2, 3), 7, dtype=torch.uint8)
    assert GATES["fp32"].check("decoder", difference(image, image)) == "levels of 255 <= 1"
    assert GATES["fp16"].check("transformer", difference(torch.ones(2), torch.ones(2))) == "SQNR >= 55 dB"
    assert difference(torch.zeros(2), torch.zeros(2)).to_dict()["sqnr_db"] < float("inf")


def test_another_shape_is_no_comparison() -> None:
    with pytest.raises(ParityError, match=r"shape: got \[3\], the reference has \[2\]"):
        difference(torch.ones(2), torch.ones(3))


def test_a_gate_without_a_bound_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="bounds nothing"):
        Gate(levels=1).check("transformer", difference(torch.ones(2), torch.ones(2)))
