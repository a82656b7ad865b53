"""A fake of TensorRT that reads and writes CPU memory at the addresses that it receives.

Its engine has the inputs x [b, 4] (fp32) and keep [b] (bool), and the output y = 2x + profile where keep, else 0. As
TensorRT it refuses shapes outside the profile, contexts beyond the memory, and plans of others.
"""

import ctypes
import json
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import numpy as np

TensorIOMode = IntEnum("TensorIOMode", ["INPUT", "OUTPUT"])
LayerInformationFormat = SimpleNamespace(JSON="json")
ExecutionContextAllocationStrategy = SimpleNamespace(STATIC="static", USER_MANAGED="user managed")
TYPES = {"x": "FLOAT", "keep": "BOOL", "y": "FLOAT", "kept": "BOOL"}


class ILogger:
    def log(self, severity: int, message: str) -> None:
        raise NotImplementedError


def plan(batches: tuple[int, ...], contexts: int = 99) -> bytes:
    return json.dumps({"batches": batches, "contexts": contexts}).encode()


class Runtime:
    def __init__(self, logger: ILogger):
        self._logger = logger

    def deserialize_cuda_engine(self, content: bytes) -> "Engine | None":
        try:
            return Engine(**json.loads(content), logger=self._logger)
        except ValueError:
            self._logger.log(1, "IRuntime::deserializeCudaEngine: Error Code 1: Serialization (bad magic. In x at /y)")
            return None


class Engine:
    num_io_tensors = len(TYPES)
    device_memory_size_v2 = 4096

    def __init__(self, batches: list[int], contexts: int, logger: ILogger):
        self.batches, self.left, self.logger = batches, contexts, logger
        self.contexts: list[Context] = []

    def get_tensor_name(self, index: int) -> str:
        return list(TYPES)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in ("x", "keep") else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=TYPES[name])

    def create_execution_context(self, settings: object = None) -> "Context | None":
        assert getattr(settings, "strategy", settings) == ExecutionContextAllocationStrategy.USER_MANAGED
        if len(self.contexts) == self.left:
            return None
        self.contexts.append(Context(self, settings))
        return self.contexts[-1]

    def create_engine_inspector(self) -> Any:
        layers = [
            {"Inputs": [{"Format/Datatype": inputs}], "Outputs": [{"Format/Datatype": outputs}], "TacticName": kernel}
            for inputs, outputs, kernel in (
                ("Half", "Row major linear FP8 format", "quantise"),
                ("Float8E4M3", "Half", "product"),
                ("Row major linear FP16 format", "Half", "sm90_xmma_gemm_e4m3e4m3_f32f32_f16"),
                ("Half", "Float", "0x0"),
            )
        ]
        return SimpleNamespace(
            get_engine_information=lambda _: json.dumps({"Layers": [*layers, "a layer without details"]})
        )


class Context:
    def __init__(self, engine: Engine, settings: object):
        self._engine, self.settings, self.runs, self.fails = engine, settings, 0, False
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self.profile, self.streams, self.memory = -1, [], 0

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        self.streams.append(stream)
        return profile < len(self._engine.batches)

    def set_device_memory(self, memory: int, size: int) -> None:
        assert size >= self._engine.device_memory_size_v2
        self.memory = memory

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shapes[name] = shape
        return shape[0] == self._engine.batches[self.profile] and shape[1:] == ((4,) if name == "x" else ())

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._shapes["x"] if name == "y" else self._shapes["keep"]

    def set_tensor_address(self, name: str, address: int) -> None:
        self._addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        self.streams.append(stream)
        assert self.memory, "no memory for its activations"
        if self.fails:
            self._engine.logger.log(1, "IExecutionContext::enqueueV3: Error Code 1: Cuda Runtime (out of luck)")
            return False
        x, keep = self._at("x", ctypes.c_float), self._at("keep", ctypes.c_bool)
        self._at("y", ctypes.c_float)[:] = np.where(keep[:, None], 2 * x + self.profile, 0)
        self._at("kept", ctypes.c_bool)[:] = keep
        self.runs += 1
        return True

    def _at(self, name: str, kind: Any) -> Any:
        shape = self.get_tensor_shape(name) if name in ("y", "kept") else self._shapes[name]
        size = int(np.prod(shape))
        return np.ctypeslib.as_array((kind * size).from_address(self._addresses[name])).reshape(shape)


class NetworkDefinitionCreationFlag(IntEnum):
    STRONGLY_TYPED = 1


ProfilingVerbosity = SimpleNamespace(DETAILED="detailed")


class Builder:
    """Accepts every graph. Its plan holds the batch sizes of the profiles."""

    def __init__(self, logger: ILogger):
        self._logger = logger

    def create_network(self, flags: int) -> Any:
        assert flags == 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED
        tensors = [SimpleNamespace(name="x", shape=(-1, 4)), SimpleNamespace(name="keep", shape=(-1,))]
        return SimpleNamespace(num_inputs=2, num_layers=3, get_input=lambda index: tensors[index])

    def create_builder_config(self) -> "Config":
        return Config()

    def create_optimization_profile(self) -> Any:
        shapes: dict[str, Any] = {}
        return SimpleNamespace(shapes=shapes, set_shape=lambda name, *shape: shapes.update({name: shape}))

    def build_serialized_network(self, network: object, config: "Config") -> bytes | None:
        assert network is not None
        if config.broken:
            self._logger.log(1, "Error Code 2: Internal Error (no kernel fits)")
            return None
        self._logger.log(3, "Total Activation Memory: 4096 bytes")
        for shapes in config.profiles:
            assert all(least == best == most for least, best, most in shapes.values())
        return plan(tuple(shapes["x"][0][0] for shapes in config.profiles))


class Config:
    broken = False

    def __init__(self) -> None:
        self.profiles: list[dict[str, Any]] = []
        self.profiling_verbosity = ""
        self._timings = b""

    def add_optimization_profile(self, profile: Any) -> None:
        self.profiles.append(profile.shapes)

    def create_timing_cache(self, content: bytes) -> bytes | None:
        return None if content.startswith(b"torn") else content + b"+"

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if cache.startswith(b"of another card"):
            return False
        self._timings = cache
        return True

    def get_timing_cache(self) -> Any:
        return SimpleNamespace(serialize=lambda: self._timings)


class OnnxParser:
    num_errors = 0

    def __init__(self, network: object, logger: ILogger):
        self._network, self._logger = network, logger

    def parse_from_file(self, path: str) -> bool:
        if not path.endswith("broken.onnx"):
            return True
        self._logger.log(1, f"cannot open {path}")
        return False
