"""Exported graphs in onnxruntime against their torch modules."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from random_modules import SHAPE, random_controlled, random_module, random_transformer
from torch import Tensor, nn

from engines.backends.base import ModuleName
from engines.backends.parity import GATES, difference
from engines.build.example_inputs import example_inputs
from engines.build.onnx_export import OUTPUTS, export_onnx, onnx_files
from engines.errors import BuildError
from engines.models.controlnet import Injection
from engines.models.transformer import SPRINT_0_6B

onnx = pytest.importorskip("onnx", reason="the extra 'build' is not installed")
pytest.importorskip("onnxruntime", reason="the extra 'build' is not installed")

TWO_BLOCKS, WIDE = replace(SPRINT_0_6B, num_layers=2), replace(SHAPE, caption_channels=2304)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def first(outputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    return outputs if isinstance(outputs, Tensor) else outputs[0]


def run(path: Path, inputs: dict[str, Tensor]) -> list[Tensor]:
    from engines.build.onnx_runner import OnnxGraph

    return OnnxGraph(path)(inputs)


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("transformer", "fp32"),
        ("transformer", "bf16"),
        ("decoder", "fp16"),
        ("encoder", "fp32"),
        ("controlled", "fp32"),
    ],
)
def test_graph_equals_the_module_at_any_batch(name: ModuleName, precision: str, tmp_path: Path) -> None:
    dtype, path = DTYPES[precision], tmp_path / f"{name}.onnx"
    export_onnx(random_module(name, dtype), name, example_inputs(name, SHAPE, 2, dtype), path)
    assert "Range" not in {node.op_type for node in onnx.load(path).graph.node}, "positions are not folded"
    reference = random_module(name)
    for batch in (1, 3):
        outputs = run(path, example_inputs(name, SHAPE, batch, dtype))
        assert len(outputs) == len(OUTPUTS[name])
        expected = first(reference(**example_inputs(name, SHAPE, batch, torch.float32)))
        GATES[precision].check(name, difference(expected, outputs[0]))
    if name == "decoder":
        assert outputs[0].dtype == torch.uint8
        assert outputs[1].tolist() == [True] * 3
        broken = example_inputs(name, SHAPE, 2, dtype)["latent"].clone()
        broken[1, 0, 0, 0] = float("nan")
        assert run(path, {"latent": broken})[1].tolist() == [True, False]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("injection", get_args(Injection))
def test_both_published_graphs_of_a_controlnet_export(injection: Injection, precision: str, tmp_path: Path) -> None:
    dtype, path = DTYPES[precision], tmp_path / "controlled.onnx"
    module = random_controlled(dtype, injection)
    export_onnx(module, "controlled", example_inputs("controlled", SHAPE, 2, dtype), path)
    given = example_inputs("controlled", SHAPE, 3, torch.float32)
    expected = random_controlled(injection=injection)(**given)
    found = run(path, example_inputs("controlled", SHAPE, 3, dtype))[0]
    GATES[precision].check("controlled", difference(expected, found))
    without = random_controlled(injection=injection)(**{**given, "control_scale": torch.zeros(3)})
    assert difference(expected, without).sqnr_db < 25, "a graph without the branch would pass"


@pytest.fixture(scope="module")
def true_width(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes two blocks of the 0.6B in fp16."""
    path = tmp_path_factory.mktemp("graph") / "graph.onnx"
    inputs = example_inputs("transformer", WIDE, 2, torch.float16)
    export_onnx(random_transformer(TWO_BLOCKS, torch.float16), "transformer", inputs, path)
    return path


def test_two_blocks_at_true_width_keep_the_fp16_gate(true_width: Path) -> None:
    found = run(true_width, example_inputs("transformer", WIDE, 2, torch.float16))[0]
    reference = random_transformer(TWO_BLOCKS)(**example_inputs("transformer", WIDE, 2, torch.float32))
    assert GATES["fp16"].check("transformer", difference(reference, found)) == "SQNR >= 55 dB"


def test_graph_is_strongly_typed_with_fp32_islands(true_width: Path) -> None:
    assert onnx_files(true_width) == [true_width]
    graph = onnx.shape_inference.infer_shapes(onnx.load(true_width), strict_mode=True).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in [*graph.value_info, *graph.input]}
    fp16, fp32 = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT

    def types(op: str) -> list[int]:
        return [kinds[node.input[0]] for node in graph.node if node.op_type == op]

    assert set(types("Conv")) == {fp16}
    assert types("MatMul").count(fp32) == 3 * 2, "three products of linear attention per block"
    assert set(types("ReduceMean")) == {fp32}, "norm statistics"
    fixed = {value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in graph.input}
    assert fixed["latent"] == [0, 32, 4, 8]
    assert fixed["text"] == [0, 12, 2304]
    assert [d.dim_param != "" for d in graph.output[0].type.tensor_type.shape.dim] == [True, False, False, False]


class ZeroQueries(nn.Module):
    """Runs linear attention without a positive feature of any query: 0 / (0 + 1e-15)."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = random_transformer().transformer_blocks[0].attn1
        self.attention.norm_q.weight.zero_()

    def forward(self, latent: Tensor) -> Tensor:
        attended: Tensor = self.attention(latent)
        return attended


def test_the_smallest_constants_survive(tmp_path: Path) -> None:
    inputs = {"latent": torch.randn(2, 5, 160)}
    export_onnx(ZeroQueries(), "transformer", inputs, tmp_path / "graph.onnx")
    assert torch.equal(run(tmp_path / "graph.onnx", inputs)[0], ZeroQueries()(**inputs))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(BuildError, match=r"the package onnx is missing; pip install '\.\[build\]'"):
        export_onnx(nn.Identity(), "encoder", {}, tmp_path / "graph.onnx")


class Unknown(nn.Module):
    def forward(self, latent: Tensor) -> Tensor:
        return torch.special.airy_ai(latent)


def test_an_operator_without_translation_is_named(tmp_path: Path) -> None:
    inputs = example_inputs("decoder", SHAPE, 2, torch.float32)
    with pytest.raises(BuildError, match=r"encoder cannot be written as ONNX: .*airy_ai"):
        export_onnx(Unknown(), "encoder", inputs, tmp_path / "graph.onnx")
    assert not list(tmp_path.iterdir())


def test_a_damaged_graph_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "graph.onnx"
    path.write_bytes(b"\x08\x0a\x12")
    with pytest.raises(BuildError, match=r"graph\.onnx: not a valid graph"):
        run(path, {})
