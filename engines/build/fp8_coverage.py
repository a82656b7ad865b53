"""The share of a graph's matrix arithmetic that has fp8 inputs, counted from the graph."""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

_PASSED_THROUGH = {"Transpose", "Reshape", "Cast"}  # between a quantised weight and the product that reads it


def fp8_share(path: Path) -> float:
    """Returns the share of multiplications in MatMul, Gemm and Conv with two dequantised E4M3 factors, at batch 1."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = 1
    del model.graph.value_info[:]
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {  # the only dynamic dimension is the batch
        value.name: [dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim]
        for value in [*graph.value_info, *graph.input, *graph.output]
    }
    shapes |= {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            kinds[node.output[0]] = node.attribute[0].t.data_type
    total = fp8 = 0
    for node in graph.node:
        if node.op_type not in ("MatMul", "Gemm", "Conv"):
            continue
        count = _multiplications(node, shapes)
        total += count
        fp8 += count * all(_is_fp8(name, makers, kinds) for name in node.input[:2])
    return fp8 / total


def _multiplications(node: Any, shapes: Mapping[str, list[int]]) -> int:
    """Returns output values times the products that each sums. Raises KeyError without a shape in the graph."""
    out, weight = shapes[node.output[0]], shapes[node.input[1]]
    if node.op_type == "Conv":
        return prod(out) * prod(weight[1:])
    transposed = node.op_type == "Gemm" and any(item.name == "transB" and item.i for item in node.attribute)
    return prod(out) * (weight[-1] if transposed else weight[-2])


def _is_fp8(name: str, makers: Mapping[str, Any], kinds: Mapping[str, int]) -> bool:
    from onnx import TensorProto

    node = makers.get(name)
    while node is not None and node.op_type in _PASSED_THROUGH:
        node = makers.get(node.input[0])
    if node is None or node.op_type != "DequantizeLinear":
        return False
    return kinds.get(node.input[2]) == TensorProto.FLOAT8E4M3FN
