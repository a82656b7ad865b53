"""Runs an exported graph on the CPU with onnxruntime, to compare it before a vendor compiles it.

onnxruntime has no CPU kernels for bf16. Each operator therefore runs in fp32 and rounds its result to bf16, as a GPU
kernel with an fp32 accumulator does.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engines.errors import BuildError


class OnnxGraph:
    """A callable from named torch inputs to the outputs in the graph's order, on the CPU.

    Raises BuildError for an invalid graph.
    """

    def __init__(self, path: Path):
        import onnx
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = (
            torch.get_num_threads()
        )  # without a number, onnxruntime pins its threads to cores
        options.log_severity_level = 3
        emulated = path.with_name(path.stem + ".emulated.onnx")  # beside its weights
        try:
            onnx.checker.check_model(str(path))
            header = onnx.load(str(path), load_external_data=False)
            if _has_bf16(header):
                onnx.save(_emulate_bf16(header), str(emulated))
            source = str(emulated if emulated.exists() else path)
            self._session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except (onnx.checker.ValidationError, onnxruntime.capi.onnxruntime_pybind11_state.Fail) as error:
            raise BuildError(f"{path.name}: not a valid graph: {str(error).splitlines()[0]}") from error
        finally:
            emulated.unlink(missing_ok=True)

    def __call__(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        feed = {}
        for node in self._session.get_inputs():
            value = inputs[node.name].detach().cpu()
            feed[node.name] = (value.float() if node.type == "tensor(float)" else value).numpy()
        return [torch.from_numpy(value) for value in self._session.run(None, feed)]


def _has_bf16(model: Any) -> bool:
    from onnx import TensorProto

    values = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    return any(value.type.tensor_type.elem_type == TensorProto.BFLOAT16 for value in values)


def _emulate_bf16(model: Any) -> Any:
    """Returns the graph with each operator in fp32 between casts from and to bf16; inputs and outputs are fp32."""
    from onnx import TensorProto, helper

    graph = model.graph
    values = [*graph.input, *graph.output, *graph.value_info]
    rounded = {value.name for value in values if value.type.tensor_type.elem_type == TensorProto.BFLOAT16}
    rounded |= {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.BFLOAT16}
    nodes = []

    def cast(source: str, target: str, dtype: int) -> None:
        nodes.append(helper.make_node("Cast", [source], [target], to=dtype))

    for value in graph.input:
        if value.name in rounded:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
            cast(value.name, f"{value.name}.rounded", TensorProto.BFLOAT16)
            cast(f"{value.name}.rounded", f"{value.name}.wide", TensorProto.FLOAT)
    for tensor in graph.initializer:
        if tensor.name in rounded:
            cast(tensor.name, f"{tensor.name}.wide", TensorProto.FLOAT)
    outputs = {value.name for value in graph.output}
    for node in graph.node:
        narrow = [name for name in node.output if name in rounded]
        for index, name in enumerate(node.input):
            if name in rounded:
                node.input[index] = f"{name}.wide"
        for index, name in enumerate(node.output):
            if name in rounded:
                node.output[index] = f"{name}.exact"
        if node.op_type == "Cast":
            for attribute in node.attribute:
                if attribute.name == "to" and attribute.i == TensorProto.BFLOAT16:
                    attribute.i = TensorProto.FLOAT
        nodes.append(node)
        for name in narrow:
            cast(f"{name}.exact", f"{name}.rounded", TensorProto.BFLOAT16)
            cast(f"{name}.rounded", name if name in outputs else f"{name}.wide", TensorProto.FLOAT)
    for value in graph.output:
        if value.name in rounded:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    return model
