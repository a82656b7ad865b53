"""Adapters by request on the GPU path, by references on the CPU: as the modules with the same stacks."""

import copy

import pytest
import torch
from small_checkpoint import EVERYWHERE, SMALL_TRANSFORMER, random_factors, randomise_weights

from engines.backends.cuda.adapted import CudaAdapted
from engines.backends.cuda.controlled import CudaControlled
from engines.backends.cuda.transformer import CudaTransformer
from engines.kernels.op import Ops, sqnr_db
from engines.models.controlnet import ControlledTransformer, ControlNet
from engines.models.lora import Adapted, Chosen, Factors, adapt
from engines.models.transformer import SprintTransformer

CHOSEN = Chosen(torch.tensor([[0, 1], [1, 0], [0, 0]]), torch.tensor([[1.0, -0.5], [0.7, 0.0], [0.0, 0.0]]))


def factors(transformer: SprintTransformer, seed: int, rank: int, modules: tuple[str, ...]) -> dict[str, Factors]:
    made = random_factors(transformer, modules, rank, seed)
    return {
        name: Factors(*(made[f"transformer.{name}.lora_{part}.weight"].flatten(1) for part in "AB")) for name in modules
    }


@pytest.mark.parametrize("drawn", [False, True])
def test_equals_the_modules_with_the_same_choice(drawn: bool) -> None:
    torch.manual_seed(0)
    transformer = randomise_weights(SprintTransformer(SMALL_TRANSFORMER))
    assert isinstance(transformer, SprintTransformer)
    for name, weight in transformer.named_parameters():
        if "norm_q" in name or "norm_k" in name:
            torch.nn.init.normal_(weight)  # negative ones too
    stacked = [factors(transformer, 1, 2, EVERYWHERE), factors(transformer, 2, 3, EVERYWHERE[4:])]
    choice = adapt(transformer, stacked)
    whole = ControlledTransformer(transformer, ControlNet.of(transformer, 2)) if drawn else transformer
    module = Adapted(whole, choice).eval().requires_grad_(False)
    drawing = (torch.randn(3, 4, 3, 5), torch.tensor([1.0, 0.5, 0.0])) if drawn else ()
    given = (torch.randn(3, 4, 3, 5), torch.randn(3, 6, 24), torch.tensor([1.0, 0.7, 0.4]), torch.full((3,), 0.45))
    arguments = (*given, None, *drawing)
    with torch.inference_mode():
        expected, without = copy.deepcopy(module)(*arguments, chosen=CHOSEN), copy.deepcopy(module)(*arguments)
    base = CudaTransformer(transformer, Ops(None))
    inner = CudaControlled(whole, Ops(None), base) if isinstance(whole, ControlledTransformer) else base
    fast = CudaAdapted(inner, choice)
    latent, text, time, guidance = given
    found = fast.denoiser(text, None, guidance, *drawing, chosen=CHOSEN)(latent, time)
    assert sqnr_db(expected, found) > 90
    assert sqnr_db(expected, fast(*arguments, chosen=CHOSEN)) > 90
    assert sqnr_db(without, fast(*arguments)) > 90
    assert sqnr_db(expected[2:], without[2:]) > 90
    assert sqnr_db(expected[:2], without[:2]) < 20
