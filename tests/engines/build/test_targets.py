"""The allowed combinations of GPU, precision and compiler."""

from pathlib import Path

import pytest
import torch

from engines.artifacts.precision import module_dtype, module_precision
from engines.backends.base import ModuleName
from engines.build.targets import Target, resolve
from engines.device.hardware import Machine, _cpu_name, _driver, capability_text, this_machine
from engines.errors import BuildError

PLAIN = Machine("a CPU")
ADA = Machine("a CPU", "NVIDIA GeForce RTX 4090", (8, 9), "580.1", 1e9)
HOPPER = Machine("a CPU", "NVIDIA H100 80GB HBM3", (9, 0), "580.1", 1e9)
AMPERE = Machine("a CPU", "NVIDIA GeForce RTX 3090", (8, 6), "580.1", 1e9)
TURING = Machine("a CPU", "NVIDIA T4", (7, 5), "580.1", 1e9)
ALL = ("tensorrt", "tensorrt_rtx", "openvino")


@pytest.mark.parametrize(
    ("gpu", "precision", "machine", "packages", "expected"),
    [
        ("cpu", "bf16", ADA, ALL, Target("cpu", "openvino", "openvino", None, True)),
        ("rtx4090", "fp8", PLAIN, ALL, Target("rtx4090", "tensorrt", "tensorrt_rtx", (8, 9), False, 24e9)),
        ("rtx4090", "fp16", HOPPER, ALL, Target("rtx4090", "tensorrt", "tensorrt_rtx", (8, 9), False, 24e9)),
        ("rtx4090", "fp16", ADA, ALL, Target("rtx4090", "tensorrt", "tensorrt", (8, 9), True, 1e9)),
        ("native", "fp16", ADA, ("tensorrt_rtx",), Target("native", "tensorrt", "tensorrt_rtx", (8, 9), True, 1e9)),
        ("h100", "fp8", HOPPER, ALL, Target("h100", "tensorrt", "tensorrt", (9, 0), True, 1e9)),
        ("native", "bf16", AMPERE, ALL, Target("native", "tensorrt", "tensorrt", (8, 6), True, 1e9)),
    ],
)
def test_what_compiles(
    gpu: str,
    precision: str,
    machine: Machine,
    packages: tuple[str, ...],
    expected: Target,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("engines.backends.openvino.has_bf16", lambda: True)  # on any CPU
    assert resolve(gpu, precision, machine, lambda name: name in packages or None) == expected


@pytest.mark.parametrize(
    ("gpu", "precision", "machine", "packages", "message"),
    [
        ("cpu", "fp16", PLAIN, ALL, "precision: got 'fp16', a CPU engine is built in fp32, bf16"),
        ("cpu", "fp32", PLAIN, (), r"openvino is missing; pip install '\.\[openvino\]'"),
        ("native", "fp16", PLAIN, ALL, "none was found; use h100, rtx4090 \\(ahead of time\\) or cpu"),
        ("native", "fp8", AMPERE, ALL, "compute capability 8.6 has no fp8 arithmetic, 8.9 or newer has; use fp16"),
        ("native", "bf16", TURING, ALL, "compute capability 7.5 has no bf16 arithmetic, 8.0 or newer has"),
        ("h100", "fp16", PLAIN, ALL, "on an H100 only, and this machine has no NVIDIA GPU"),
        ("h100", "fp16", ADA, ALL, r"on an H100 only, and this machine has NVIDIA GeForce RTX 4090 \(8.9\)"),
        ("h100", "fp16", HOPPER, ("openvino",), r"tensorrt is missing; pip install '\.\[tensorrt\]'"),
        ("rtx4090", "fp16", PLAIN, ("openvino",), r"tensorrt_rtx is missing; pip install '\.\[tensorrt-rtx\]'"),
        ("rtx4090", "int8", PLAIN, ALL, "precision: got 'int8', allowed fp16, bf16, fp8, fp32"),
        ("a100", "fp16", PLAIN, ALL, "gpu: got 'a100', allowed h100, rtx4090, native, cpu"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(
    gpu: str, precision: str, machine: Machine, packages: tuple[str, ...], message: str
) -> None:
    vendor = None if gpu == "cpu" else "tensorrt"
    with pytest.raises(BuildError, match=message):
        resolve(gpu, precision, machine, lambda name: name in packages or None, vendor)


@pytest.mark.parametrize(
    ("gpu", "precision", "machine", "packages", "vendor", "expected"),
    [
        ("h100", "bf16", PLAIN, ("triton",), None, Target("h100", "cuda-graph", "native", (9, 0), False)),
        ("rtx4090", "fp8", PLAIN, (*ALL, "triton"), "native", Target("rtx4090", "cuda-graph", "native", (8, 9), False)),
        ("native", "fp8", HOPPER, ("triton",), None, Target("native", "cuda-graph", "native", (9, 0), False)),
    ],
)
def test_our_own_kernels_are_compiled_without_a_card(
    gpu: str, precision: str, machine: Machine, packages: tuple[str, ...], vendor: str | None, expected: Target
) -> None:
    assert resolve(gpu, precision, machine, lambda name: name in packages or None, vendor) == expected


@pytest.mark.parametrize(
    ("gpu", "precision", "machine", "packages", "vendor", "message"),
    [
        ("h100", "fp16", PLAIN, ("triton",), None, "precision: got 'fp16', a native engine is built in bf16, fp8"),
        ("h100", "bf16", PLAIN, (), None, "the package triton is missing"),
        ("native", "bf16", AMPERE, ("triton",), "native", r"for h100 \(9\.0\), rtx4090 \(8\.9\), and this machine has"),
        ("h100", "bf16", PLAIN, ("triton",), "onnx", "vendor: got 'onnx', allowed tensorrt, native"),
        ("cpu", "bf16", PLAIN, ALL, "native", "vendor: got 'native', and a CPU's engines are OpenVINO's"),
    ],
)
def test_what_our_own_kernels_cannot_be_built_for_is_refused(
    gpu: str, precision: str, machine: Machine, packages: tuple[str, ...], vendor: str | None, message: str
) -> None:
    with pytest.raises(BuildError, match=message):
        resolve(gpu, precision, machine, lambda name: name in packages or None, vendor)


@pytest.mark.parametrize(
    ("name", "precision", "expected"),
    [
        ("transformer", "fp8", "fp8"),
        ("decoder", "fp8", "fp16"),
        ("encoder", "fp8", "fp16"),
        ("decoder", "bf16", "bf16"),
    ],
)
def test_fp8_is_the_transformers_alone(name: ModuleName, precision: str, expected: str) -> None:
    assert module_precision(precision, name) == expected
    assert module_dtype("fp8") == torch.float16


def test_this_machine_is_described(tmp_path: Path) -> None:
    assert this_machine().cpu
    assert ADA.label == "NVIDIA GeForce RTX 4090 (8.9)"
    assert capability_text(None) == "none"
    info = tmp_path / "info"
    assert _cpu_name(info)
    assert _driver(info) is None
    info.write_text("processor\t: 0\nmodel name\t: A CPU @ 2 GHz\n")
    assert _cpu_name(info) == "A CPU @ 2 GHz"
    assert _driver(info) is None
    info.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue Sep 23 10:11:16 UTC 2025\n")
    assert _driver(info) == "580.95.05"


@pytest.mark.gpu
def test_the_card_of_this_machine_is_described() -> None:
    machine = this_machine()
    assert machine.gpu == torch.cuda.get_device_name(0)
    assert machine.capability == torch.cuda.get_device_capability(0)
