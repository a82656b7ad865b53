"""fp8: the quantised layers, the scales of the calibration, and the graph."""

from pathlib import Path

import pytest
import torch
from random_modules import SHAPE, random_transformer
from torch import Tensor, nn

from engines.backends.parity import GATES, difference
from engines.backends.tensorrt.builder import build_engine
from engines.build.example_inputs import example_inputs
from engines.build.fp8_coverage import fp8_share
from engines.build.onnx_export import export_onnx
from engines.build.onnx_runner import OnnxGraph
from engines.build.quantization import (
    FP8_RULES,
    cast_to,
    onnx_translations,
    quantised_layers,
    quantize,
    rule_for,
    run_calibration,
    sensitivity,
)
from engines.errors import BuildError
from engines.models.transformer import SPRINT_0_6B, SPRINT_1_6B, SprintTransformer
from engines.pipeline.calibration import CalibrationPrompts

onnx = pytest.importorskip("onnx", reason="the extra 'build' is not installed")
pytest.importorskip("modelopt", reason="the extra 'build' is not installed")

TEXTS = CalibrationPrompts(
    torch.randn(3, SHAPE.tokens, 128, generator=torch.Generator().manual_seed(0)), torch.ones(3, 12, dtype=bool)
)
SIDES = [(SHAPE.height, SHAPE.width)]


@pytest.fixture(scope="module")
def quantised() -> nn.Module:
    return cast_to(quantize(random_transformer(), TEXTS, SIDES, (1, 2), 32), torch.float16)


@pytest.fixture(scope="module")
def graph(quantised: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graph") / "transformer.onnx"
    with onnx_translations() as translations:
        export_onnx(
            quantised, "transformer", example_inputs("transformer", SHAPE, 2, torch.float16), path, translations
        )
    return path


def reference() -> Tensor:
    velocity: Tensor = random_transformer()(**example_inputs("transformer", SHAPE, 2, torch.float32))
    return velocity


def test_the_graph_keeps_the_gate_and_is_really_rounded(graph: Path) -> None:
    [found] = OnnxGraph(graph)(example_inputs("transformer", SHAPE, 2, torch.float16))
    distance = difference(reference(), found)
    assert GATES["fp8"].check("transformer", distance) == "SQNR >= 25 dB"
    assert distance.sqnr_db < 40


def test_weights_and_scales_have_the_type_of_the_graph_and_other_buffers_their_own(quantised: nn.Module) -> None:
    buffers = dict(quantised.named_buffers())
    scales = {name: value for name, value in buffers.items() if name.endswith("_amax")}
    assert len(scales) == 2 * len(quantised_layers(random_transformer())) == 2 * 2 * 9
    assert {value.dtype for value in (*quantised.parameters(), *scales.values())} == {torch.float16}
    with_positions = nn.Module()
    with_positions.register_buffer("pos_embed", torch.zeros(1))
    assert next(cast_to(with_positions, torch.float16).buffers()).dtype == torch.float32


def test_most_of_the_arithmetic_has_fp8_inputs(graph: Path, tmp_path: Path) -> None:
    width, cells, tokens, blocks = 160, 32, 12, 2
    taken = blocks * width**2 * (3 * cells + 2 * cells + 2 * tokens + 7.5 * cells)
    products_of_attention = 2 * cells * width * 32 + cells * width + 2 * cells * tokens * width
    left = blocks * (9 * 5 * width * cells + width**2 * cells + products_of_attention)
    left += cells * 32 * width * 2 + tokens * (128 * width + width**2)
    left += 2 * (256 * width + width**2) + 6 * width**2
    assert fp8_share(graph) == pytest.approx(taken / (taken + left))
    assert fp8_share(graph) > 0.8, "0.86 in the shipped checkpoint, where both ends weigh a third of that"
    plain = tmp_path / "plain.onnx"
    export_onnx(
        random_transformer(dtype=torch.float16),
        "transformer",
        example_inputs("transformer", SHAPE, 2, torch.float16),
        plain,
    )
    assert fp8_share(plain) == 0


def test_quantisers_stand_where_the_table_says(graph: Path) -> None:
    made = onnx.load(graph).graph
    pairs = [node for node in made.node if node.op_type == "QuantizeLinear"]
    assert len(pairs) == 2 * 2 * 9, "input and weight of nine layers in each of two blocks"
    makers = {name: node.op_type for node in made.node for name in node.output}
    assert "LayerNormalization" not in {makers.get(node.input[0]) for node in pairs}
    grouped = [node for node in made.node if node.op_type == "Conv" and _groups(node) > 1]
    assert grouped
    assert all(makers.get(name) != "DequantizeLinear" for node in grouped for name in node.input)


def _groups(node: object) -> int:
    return next((item.i for item in node.attribute if item.name == "group"), 1)  # type: ignore[attr-defined]


@pytest.mark.parametrize("config", [SPRINT_0_6B, SPRINT_1_6B], ids=["0.6B", "1.6B"])
def test_the_table_decides_about_every_layer_of_the_published_sizes(config: object) -> None:
    with torch.device("meta"):
        module = SprintTransformer(config)
    layers = [name for name, part in module.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    assert len(quantised_layers(module)) == 9 * config.num_layers
    assert {rule_for(name) for name in layers} == set(FP8_RULES), "a row that decides about nothing"
    assert all(row.reason for row in FP8_RULES)


def test_a_layer_without_a_row_is_an_error() -> None:
    with pytest.raises(BuildError, match=r"no row of engines\.build\.quantization\.FP8_RULES decides about 'lora_a'"):
        quantised_layers(nn.ModuleDict({"lora_a": nn.Linear(2, 2)}))


def test_calibration_runs_every_prompt_through_the_sampler() -> None:
    seen: list[tuple[float, int]] = []

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor, text: Tensor, time: Tensor, guidance: Tensor, mask: Tensor) -> Tensor:
            assert text.shape == (1, 12, 128)
            assert mask.all()
            assert float(guidance) == pytest.approx(0.45)
            seen.append((round(float(time), 3), x.shape[3]))
            return x * 0

    run_calibration(Watched(), TEXTS, [(4, 8), (4, 4)], (1, 2), 32)
    one, two = [(1.0, 8)], [(0.998, 8), (0.783, 8)]
    whole = one + two + one
    assert seen == whole + [(time, 4) for time, _ in whole]


def test_sensitivity_names_every_layer_and_leaves_the_module_as_it_was(quantised: nn.Module) -> None:
    inputs = example_inputs("transformer", SHAPE, 2, torch.float16)

    def run(module: nn.Module) -> Tensor:
        velocity: Tensor = module(**inputs)
        return velocity

    with torch.inference_mode():
        before = run(quantised)
    report = sensitivity(quantised, run, reference())
    assert set(report) == set(quantised_layers(random_transformer()))
    assert list(report.values()) == sorted(report.values())
    whole = difference(reference(), before).sqnr_db
    assert whole < min(report.values()) < 60, "each alone does less harm than all together, and some"
    with torch.inference_mode():
        assert torch.equal(run(quantised), before)


def test_the_fp8_graph_compiles_for_an_rtx_4090(graph: Path, tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="the extra 'tensorrt-rtx' is not installed")
    plan = tmp_path / "transformer.engine"
    build_engine(trt, graph, plan, (1,), (8, 9), tmp_path / "timing")
    assert plan.stat().st_size > 1e6
    with pytest.raises(BuildError, match="sm86, because the model contains HW-specific datatypes: fp8_e4m3"):
        build_engine(trt, graph, plan, (1,), (8, 6), tmp_path / "timing")
