"""The compiled backend equals the module, runs in buckets, and runs eagerly at other sizes."""

from dataclasses import replace

import pytest
import torch
from random_modules import SHAPE, TRANSFORMER, random_module, random_transformer

from engines.backends import compiled as backend
from engines.backends.base import ModuleName, ModuleSpec
from engines.backends.compiled import compiled
from engines.backends.parity import GATES, difference
from engines.build.example_inputs import example_inputs
from engines.errors import ParityError

CPU = torch.device("cpu")
SIZE = (SHAPE.pixels[1], SHAPE.pixels[0])


def spec(name: ModuleName) -> ModuleSpec:
    return ModuleSpec(name, torch.float32, CPU, 2, SHAPE.tokens, (SIZE,), SHAPE.compression)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler uses deprecated parts of torch
def test_compiled_transformer_equals_the_module() -> None:
    config = replace(TRANSFORMER, num_layers=1)
    run = compiled(random_transformer(config), spec("transformer"))
    inputs = example_inputs("transformer", SHAPE, 2, torch.float32)
    with torch.inference_mode():
        expected = random_transformer(config)(**inputs)
        GATES["fp32"].check("transformer", difference(expected, run(**inputs)))
    assert torch._dynamo.config.recompile_limit != backend._SHAPES


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Returns the shapes of the first input of each compiled call; 'compiled' modules are the modules themselves."""
    shapes: list[tuple[int, ...]] = []

    def traced(module: torch.nn.Module, **flags: object) -> object:
        assert flags == {"fullgraph": True, "dynamic": False, "mode": None}
        return lambda **inputs: shapes.append(tuple(next(iter(inputs.values())).shape)) or module(**inputs)

    monkeypatch.setattr(torch, "compile", traced)
    return shapes


@pytest.mark.parametrize("name", ["transformer", "decoder", "fast_decoder", "encoder"])
def test_batches_run_in_buckets_and_other_sizes_run_plain(name: ModuleName, compiles: list[tuple[int, ...]]) -> None:
    run, module = compiled(random_module(name), replace(spec(name), max_batch=4)), random_module(name)
    for batch, shape in ((3, SHAPE), (1, SHAPE), (1, replace(SHAPE, width=4))):
        inputs = example_inputs(name, shape, batch, torch.float32)
        expected, actual = module(**inputs), run(**inputs)
        pair = (expected[0], actual[0]) if name.endswith("decoder") else (expected, actual)
        GATES["fp32"].check(name, difference(*pair))
    assert [shape[0] for shape in compiles] == [4, 4, 1, 1], "each shape is held to the module once, then runs"


def test_a_compiled_module_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(module: torch.nn.Module, **_: object) -> object:
        return lambda **inputs: module(**inputs) * 1.02

    monkeypatch.setattr(torch, "compile", wrong)
    run = compiled(random_module("transformer"), spec("transformer"))
    with pytest.raises(ParityError, match="transformer in batches of 2: too far from its reference"):
        run(**example_inputs("transformer", SHAPE, 2, torch.float32))
