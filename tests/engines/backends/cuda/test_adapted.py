"""Adapters per job on the GPU path, by references on the CPU, equal the modules with the same stacks."""

import copy

import pytest
import torch
from small_checkpoint import EVERYWHERE, SMALL_TRANSFORMER, random_factors, randomise_weights

from engines.backends.cuda.adapted import CudaAdapted
from engines.backends.cuda.controlled import CudaControlled
from engines.backends.cuda.transformer import CudaTransformer
from engines.kernels.op import Ops, sqnr_db
from engines.models.controlnet import ControlledTransformer, ControlNet
from engines.models.lora import AdaptedTransformer, AdapterSelection, Factors, add_adapters
from engines.models.transformer import SprintTransformer

SELECTION = AdapterSelection(
    torch.tensor([[0, 1], [1, 0], [0, 0]]), torch.tensor([[1.0, -0.5], [0.7, 0.0], [0.0, 0.0]])
)


def factors(transformer: SprintTransformer, seed: int, rank: int, modules: tuple[str, ...]) -> dict[str, Factors]:
    weights = random_factors(transformer, modules, rank, seed)
    return {
        name: Factors(*(weights[f"transformer.{name}.lora_{part}.weight"].flatten(1) for part in "AB"))
        for name in modules
    }


@pytest.mark.parametrize("with_control", [False, True])
def test_equals_the_modules_with_the_same_choice(with_control: bool) -> None:
    torch.manual_seed(0)
    transformer = randomise_weights(SprintTransformer(SMALL_TRANSFORMER))
    assert isinstance(transformer, SprintTransformer)
    for name, weight in transformer.named_parameters():
        if "norm_q" in name or "norm_k" in name:
            torch.nn.init.normal_(weight)  # negative ones too
    stacked = [factors(transformer, 1, 2, EVERYWHERE), factors(transformer, 2, 3, EVERYWHERE[4:])]
    active_adapters = add_adapters(transformer, stacked)
    model = ControlledTransformer(transformer, ControlNet.of(transformer, 2)) if with_control else transformer
    module = AdaptedTransformer(model, active_adapters).eval().requires_grad_(False)
    control = (torch.randn(3, 4, 3, 5), torch.tensor([1.0, 0.5, 0.0])) if with_control else ()
    inputs = (torch.randn(3, 4, 3, 5), torch.randn(3, 6, 24), torch.tensor([1.0, 0.7, 0.4]), torch.full((3,), 0.45))
    arguments = (*inputs, None, *control)
    with torch.inference_mode():
        expected, without = copy.deepcopy(module)(*arguments, chosen=SELECTION), copy.deepcopy(module)(*arguments)
    base = CudaTransformer(transformer, Ops(None))
    inner = CudaControlled(model, Ops(None), base) if isinstance(model, ControlledTransformer) else base
    adapted = CudaAdapted(inner, active_adapters)
    latent, text, time, guidance = inputs
    actual = adapted.denoiser(text, None, guidance, *control, chosen=SELECTION)(latent, time)
    assert sqnr_db(expected, actual) > 90
    assert sqnr_db(expected, adapted(*arguments, chosen=SELECTION)) > 90
    assert sqnr_db(without, adapted(*arguments)) > 90
    assert sqnr_db(expected[2:], without[2:]) > 90
    assert sqnr_db(expected[:2], without[:2]) < 20


def test_in_8_bits_layers_with_adapters_stay_as_they_are() -> None:
    torch.manual_seed(0)
    transformer = randomise_weights(SprintTransformer(SMALL_TRANSFORMER)).bfloat16()
    assert isinstance(transformer, SprintTransformer)
    only = tuple(name for name in EVERYWHERE if "attn1" in name)
    choice = add_adapters(transformer, [factors(transformer, 1, 2, only)])
    arguments = (torch.randn(2, 4, 3, 5), torch.randn(2, 6, 24), torch.tensor([1.0, 0.7]), torch.full((2,), 0.45))
    selection = AdapterSelection(torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1))
    fast = CudaTransformer(transformer, Ops(None))
    adapted = CudaAdapted(fast, choice)
    fast.blocks.calibrates = True
    expected = adapted(*arguments, chosen=selection)
    without = adapted(*arguments)
    fast.blocks.calibrates = False
    fast.to_fp8()
    assert 20 < sqnr_db(expected, adapted(*arguments, chosen=selection)) < 60
    assert 20 < sqnr_db(without, adapted(*arguments)) < 60
    assert sqnr_db(expected, without) < 20
    adapters = [block.qkv.scales is None for block in fast.blocks._weights]
    assert adapters == [True, True, False]  # the last block has none
