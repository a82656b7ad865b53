"""TensorRT for RTX compiles our graphs ahead of time, and its errors become ours.

The tests prove that the graphs parse, that types and shapes are legal, and that the compiler accepts them for compute
capability 8.9. They do not prove that the engines run, nor how fast (docs/understand/gpu-proof.md).
"""

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_modules import SHAPE, random_module

from engines.backends.base import ModuleName
from engines.backends.tensorrt.builder import build_engine
from engines.backends.tensorrt.log import Log, summarise
from engines.backends.tensorrt.runtime import Scratch, TensorRtGraph
from engines.backends.tensorrt.vendor import vendor
from engines.build.example_inputs import example_inputs
from engines.build.onnx_export import export_onnx
from engines.errors import ArtifactError, BackendError, BuildError

trt = pytest.importorskip("tensorrt_rtx", reason="the extra 'tensorrt-rtx' is not installed: nothing is compiled here")
onnx = pytest.importorskip("onnx", reason="the extra 'build' is not installed")

HALF, SINGLE = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
ADA, AMPERE, TURING, HOPPER = (8, 9), (8, 6), (7, 5), (9, 0)


@pytest.mark.parametrize(
    ("name", "dtype"), [("transformer", torch.float16), ("decoder", torch.bfloat16), ("encoder", torch.float16)]
)
def test_our_graphs_compile_for_an_rtx_4090(name: ModuleName, dtype: torch.dtype, tmp_path: Path) -> None:
    graph, plan, timing = tmp_path / f"{name}.onnx", tmp_path / f"{name}.engine", tmp_path / "timing"
    export_onnx(random_module(name, dtype), name, example_inputs(name, SHAPE, 2, dtype), graph)
    details = build_engine(trt, graph, plan, (1, 4), ADA, timing)
    assert plan.stat().st_size > 1e6
    assert details["batches"] == [1, 4]
    assert isinstance(details["layers"], int)
    assert details["layers"] > 100
    assert isinstance(details["activation_bytes"], int)
    assert details["activation_bytes"] > 1e6
    assert not timing.exists(), "ahead of time nothing is timed"


def test_a_taesana_of_the_published_size_compiles_for_an_rtx_4090(tmp_path: Path) -> None:
    graph, plan = tmp_path / "decoder.onnx", tmp_path / "decoder.engine"
    inputs = example_inputs("decoder", SHAPE, 2, torch.bfloat16)
    export_onnx(random_module("fast_decoder", torch.bfloat16), "decoder", inputs, graph)
    assert build_engine(trt, graph, plan, (1, 4), ADA, tmp_path / "timing")["batches"] == [1, 4]
    assert plan.stat().st_size > 2 * 8.3e6  # the weights in 16 bits


Model = Any  # onnx.ModelProto


def model(nodes: list[Any], weights: list[Any], kind: int = HALF) -> Model:
    """Returns a graph of `nodes` from x [b, 4] to y [b, 4]."""
    x, y = (onnx.helper.make_tensor_value_info(name, kind, ["b", 4]) for name in "xy")
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("acme", 1)]
    return onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "g", [x], [y], weights), opset_imports=opsets, ir_version=10
    )


def product(rows: int, kind: type) -> Model:
    weight = onnx.numpy_helper.from_array(np.ones((rows, 4), kind), "w")
    return model([onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name="product")], [weight])


def quantised() -> Model:
    make = onnx.helper.make_node
    weights = [
        onnx.numpy_helper.from_array(np.eye(4, dtype=np.float16), "w"),
        onnx.numpy_helper.from_array(np.float16(0.1), "scale"),
        onnx.helper.make_tensor("zero", onnx.TensorProto.FLOAT8E4M3FN, [], b"\0", raw=True),
    ]
    nodes = []
    for name in ("x", "w"):
        nodes.append(make("QuantizeLinear", [name, "scale", "zero"], [f"{name}q"]))
        nodes.append(make("DequantizeLinear", [f"{name}q", "scale", "zero"], [f"{name}d"]))
    return model([*nodes, make("MatMul", ["xd", "wd"], ["y"], name="product")], weights)


def compile_model(graph: Model, capability: tuple[int, int], folder: Path) -> Path:
    onnx.save(graph, folder / "graph.onnx")
    build_engine(trt, folder / "graph.onnx", folder / "graph.engine", (1,), capability, folder / "timing")
    return folder / "graph.engine"


def relu(kind: int) -> Model:
    return model([onnx.helper.make_node("Relu", ["x"], ["y"])], [], kind)


@pytest.mark.parametrize(
    ("graph", "capability", "message"),
    [
        (
            lambda: model([onnx.helper.make_node("Sparkle", ["x"], ["y"], name="shine", domain="acme")], []),
            ADA,
            r"refuses the graph: node shine \(Sparkle\): it has no such operator$",
        ),
        (
            lambda: product(4, np.float32),
            ADA,
            r"node product \(MatMul\): .*must have same input types. `A` is of type Half and `B` is of type Float$",
        ),
        (
            lambda: product(5, np.float16),
            ADA,
            r"node product \(MatMul\): .*last dimension of input0 = 4 and second to last .* = 5 but must match$",
        ),
        (quantised, AMPERE, r"cannot compile the graph: .*target\(s\) sm86, because .*datatypes: fp8_e4m3$"),
        (lambda: relu(onnx.TensorProto.BFLOAT16), TURING, r"cannot compile .*target\(s\) sm75, because .*: b16$"),
        (lambda: relu(HALF), HOPPER, r"^gpu: tensorrt_rtx \S+ does not build for compute capability 90$"),
    ],
    ids=["unknown operator", "mixed types", "wrong shape", "fp8 on 8.6", "bf16 on 7.5", "Hopper"],
)
def test_what_cannot_run_is_refused_by_name(
    graph: Any, capability: tuple[int, int], message: str, tmp_path: Path
) -> None:
    with pytest.raises(BuildError, match=message) as caught:
        compile_model(graph(), capability, tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "graph.engine").exists()


def test_fp8_compiles_where_the_card_has_it(tmp_path: Path) -> None:
    assert compile_model(quantised(), ADA, tmp_path).stat().st_size > 0


def test_a_file_that_is_no_graph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "graph.onnx").write_bytes(b"\x08\x0a\x12")
    with pytest.raises(BuildError, match=r"graph: tensorrt_rtx refuses the graph: .*Failed to parse the ONNX model"):
        build_engine(trt, tmp_path / "graph.onnx", tmp_path / "graph.engine", (1,), ADA, tmp_path / "timing")


def test_no_cycle_is_collected_while_a_vendor_holds_its_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT calls the logger under a lock that a builder's destructor takes."""
    collecting = []

    class Told(list[tuple[int, str]]):
        def append(self, _line: tuple[int, str]) -> None:
            collecting.append(gc.isenabled())

    monkeypatch.setattr(Log, "__init__", lambda log: setattr(log, "lines", Told()))
    (tmp_path / "graph.onnx").write_bytes(b"\x08\x0a\x12")
    with pytest.raises(BuildError):
        build_engine(trt, tmp_path / "graph.onnx", tmp_path / "graph.engine", (1,), ADA, tmp_path / "timing")
    assert collecting
    assert not any(collecting)
    assert gc.isenabled()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_an_engine_is_refused_with_the_reason(tmp_path: Path) -> None:
    plan = compile_model(relu(HALF), ADA, tmp_path)
    with pytest.raises(ArtifactError, match=r"graph\.engine: tensorrt_rtx refuses it: cudaError \d+: CUDA driver"):
        TensorRtGraph(trt, plan, (1,), tmp_path / "jit", Scratch(torch.device("cpu")))


def test_a_missing_package_is_named() -> None:
    with pytest.raises(BackendError, match=r"tensorrt_none: the package is missing; pip install '\.\[tensorrt-none\]'"):
        vendor("tensorrt_none")


def test_silence_is_told_as_such() -> None:
    assert Log().first_error() == "no reason given"
    assert Log().activation_bytes() is None
    assert Log([(3, "fine"), (1, "[E] [x] broken."), (1, "later")]).first_error() == "broken"
    assert summarise("") == ""
